"""Weights in `.bin` files: read by a loader that runs nothing, refused where they are not plain."""

import json
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path

import chex
import numpy as np
import pytest
import safetensors.torch
from hf_folders import TINY, edit_config, load_hf, make_params

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.folder import save_hf

torch = pytest.importorskip("torch")

MAX_LOADING_MEMORY = 1.5  # in parameters; PyTorch maps the file and NumPy holds the result
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def published(tmp_path):
    """A folder as MobileLLM is published: `.bin`, tied by `share_embedding`, the head in it too."""
    folder = tmp_path / "model"
    save_hf(folder, TINY, make_params(TINY))
    changes = {"model_type": "mobilellm", "architectures": ["MobileLLMForCausalLM"]}
    changes |= {"share_embedding": True, "tie_word_embeddings": False, "mobilellm": None}
    edit_config(folder, **changes)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors[HEAD] = tensors[EMBEDDING]
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def edit_bin(folder, edit, name="pytorch_model.bin"):
    tensors = torch.load(folder / name, weights_only=True)
    torch.save(edit(tensors) or tensors, folder / name)


def split_bin(folder):
    """Two files and an index."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    index = {}
    for i in range(2):
        part = {name: tensors[name].clone() for name in sorted(tensors)[i::2]}
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin").unlink()
    write_index(folder, index)
    return index


def write_index(folder, index):
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))


class MakesFile:
    """A pickle of it creates a file where it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# ---------------------------------------------------------------- what is read


def test_published_weights_are_read(published):
    config, params = load_hf(published)
    assert config == TINY
    chex.assert_trees_all_equal(params, make_params(TINY))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_without_a_change(dtype, published):
    edit_bin(published, lambda t: {name: tensor.to(dtype) for name, tensor in t.items()})
    _, params = load_hf(published)
    expected = torch.from_numpy(make_params(TINY)["embedding"]).to(dtype).float().numpy()
    np.testing.assert_array_equal(params["embedding"], expected)


def test_parameters_and_other_strides_are_read(published):
    def edit(tensors):
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = torch.nn.Parameter(tensor.t().contiguous().t())

    edit_bin(published, edit)
    chex.assert_trees_all_equal(load_hf(published)[1], make_params(TINY))


def test_a_view_that_stands_for_its_negative_is_read(published):
    negative = torch.complex(torch.ones(24), torch.full((24,), 0.5)).conj().imag
    assert negative.is_neg()
    edit_bin(published, lambda t: t | {"model.norm.weight": negative})
    assert (load_hf(published)[1]["final_norm"]["scale"] == -0.5).all()


def test_several_files_are_read_by_their_index(published):
    split_bin(published)
    chex.assert_trees_all_equal(load_hf(published)[1], make_params(TINY))


def test_safetensors_are_preferred(published):
    good = torch.load(published / "pytorch_model.bin", weights_only=True)
    good[HEAD] = good[HEAD].clone()
    safetensors.torch.save_file(good, published / "model.safetensors", {"format": "pt"})
    (published / "pytorch_model.bin").write_bytes(b"not even a pickle")
    chex.assert_trees_all_equal(load_hf(published)[1], make_params(TINY))


def test_reading_holds_the_parameters_once(published):
    tracemalloc.start()
    _, params = load_hf(published)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in _leaves(params))
    assert peak < MAX_LOADING_MEMORY * size + 200_000  # and what JSON and names take


def _leaves(tree):
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("where", ["value", "name", "whole"])
def test_code_in_a_pickle_does_not_run(where, published, tmp_path):
    trap = MakesFile(tmp_path / "ran")

    def edit(tensors):
        if where == "whole":
            return trap
        tensors.update({"x": trap} if where == "value" else {trap: torch.ones(1)})
        return tensors

    tensors = torch.load(published / "pytorch_model.bin", weights_only=True)
    torch.save(edit(tensors), published / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: is refused because it asks for code"):
        load_hf(published)
    assert not (tmp_path / "ran").exists()
    torch.load(published / "pytorch_model.bin", weights_only=False)  # the trap is one
    assert (tmp_path / "ran").exists()


def test_a_bare_pickle_with_code_does_not_run(published, tmp_path):
    (published / "pytorch_model.bin").write_bytes(pickle.dumps(MakesFile(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read"):
        load_hf(published)
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_is_refused(published):
    torch.save(torch.nn.Linear(2, 2), published / "pytorch_model.bin")
    with pytest.raises(UserError, match="asks for code"):
        load_hf(published)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: [*t.values()], "holds list, not tensors by name"),
        (lambda t: {"state_dict": t}, "state_dict is a dict, not a tensor"),
        (lambda t: t | {"model.norm.weight": torch.ones(24, device="meta")}, "no values.*meta"),
        (lambda t: t | {"x": 3}, "x is a int, not a tensor"),
        (lambda t: t | {"model.norm.weight": torch.ones(24).double()}, "float64"),
        (lambda t: t | {"model.norm.weight": torch.ones(24).to_sparse()}, "sparse"),
        (lambda t: t | {"model.norm.weight": torch.ones(1).expand(10**12)}, "larger than the file"),
        (lambda t: t | {"model.norm.weight": torch.full((24,), torch.inf)}, "model.norm.*NaN"),
        (lambda t: t | {"model.norm.weight": torch.ones(23)}, r"\[23\].*\[24\]"),
        (lambda t: t | {"model.extra": torch.ones(23)}, r"model\.extra"),
        (lambda t: t | {HEAD: torch.ones(97, 24)}, "lm_head.*differ"),
    ],
)
def test_what_is_no_plain_weight_is_refused(edit, message, published):
    edit_bin(published, edit)
    with pytest.raises(UserError, match=message):
        load_hf(published)


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"\0" * 5000])
def test_what_is_no_archive_is_refused(content, published):
    (published / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read"):
        load_hf(published)


def test_damaged_archives_are_refused_or_read_to_the_same_model(published):
    path = published / "pytorch_model.bin"
    content, rng = path.read_bytes(), np.random.default_rng(0)
    with zipfile.ZipFile(path) as archive:
        names = [i for i in archive.infolist() if i.filename.endswith("data.pkl")]
        start, size = names[0].header_offset, names[0].file_size
    refused = 0
    for i in range(60):  # in the pickle, in the directory of the archive, cut off
        place = (
            start + rng.integers(size + 60),
            len(content) - 1 - rng.integers(2000),
            rng.integers(len(content)),
        )[i % 3]
        end = place + 1 if i % 3 < 2 else len(content)
        flipped = bytes([content[place] ^ (1 << rng.integers(8))]) if i % 3 < 2 else b""
        path.write_bytes(content[:place] + flipped + content[end:])
        try:
            assert load_hf(published)[0] == TINY
        except UserError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("name", ["../pytorch_model.bin", "/etc/x.bin", "a/b.bin"])
def test_index_names_that_leave_the_folder_are_refused(name, published):
    index = split_bin(published)
    write_index(published, dict.fromkeys(index, name))
    with pytest.raises(UserError, match="leaves the folder"):
        load_hf(published)


def test_an_index_of_bin_files_names_nothing_else(published):
    index = split_bin(published)
    write_index(published, dict.fromkeys(index, "model.safetensors"))
    with pytest.raises(UserError, match="no .bin file"):
        load_hf(published)
    write_index(published, index | {"model.norm.weight": next(iter(index.values()))[:-5] + "2.bin"})
    with pytest.raises(UserError, match=r"pytorch_model\.bin\.index\.json: puts tensor"):
        load_hf(published)


def test_without_torch_the_error_names_the_command_that_installs_it(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*pip install 'mobilellm_jax\[torch\]"):
        load_hf(published)


def test_a_torch_whose_loader_is_unsafe_is_not_used(published, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UserError, match=r"not opened by torch 2\.5\.1"):
        load_hf(published)
