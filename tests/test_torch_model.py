"""The plain PyTorch module: the JAX model's logits and gradients, and its weights both ways."""

import ast
import dataclasses
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion_cases import EVERY_KIND, TOKENS, assert_same_logits, jax_logits
from model_cases import ALL_KINDS, random_params, save_params, tiny

import mobilellm_jax
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.pytorch import module_from_params, params_from_module
from mobilellm_jax.huggingface import remote_code
from mobilellm_jax.huggingface.folder import save_hf
from mobilellm_jax.model.costs import count_params
from mobilellm_jax.model.transformer import MobileLLM

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # more only disturb each other on such small models

LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
BF16_TOLERANCE = 0.2  # logits of up to 20

CODE = Path(remote_code.__file__).parent


def make_module(kind):
    return module_from_params(ALL_KINDS[kind], random_params(ALL_KINDS[kind]))


# ---------------------------------------------------------------- the same function


@EVERY_KIND
def test_logits_are_those_of_jax(kind):
    with torch.no_grad():
        ours = make_module(kind)(torch.from_numpy(TOKENS)).numpy()
    assert_same_logits(ours, jax_logits(kind), LOGIT_TOLERANCE)


@EVERY_KIND
def test_reading_in_pieces_through_the_cache_gives_the_same_logits(kind):
    from mobilellm_jax.huggingface.remote_code.model import KVCache

    module, cache = make_module(kind), KVCache()
    pieces = torch.from_numpy(TOKENS).split([1, 5, 1, 8, 2], dim=1)
    with torch.no_grad():
        ours = torch.cat([module(piece, cache) for piece in pieces], dim=1).numpy()
    assert cache.length == TOKENS.shape[1]
    assert_same_logits(ours, jax_logits(kind), LOGIT_TOLERANCE)


def test_the_cache_holds_as_many_slots_as_the_config_counts():
    from mobilellm_jax.huggingface.remote_code.model import KVCache

    for kind in ("repeat_all-x3-own", "reverse-x3-first_visit"):
        config, cache = ALL_KINDS[kind], KVCache()
        with torch.no_grad():
            make_module(kind)(torch.from_numpy(TOKENS), cache)
        assert len(cache._held) == config.num_cache_slots


def test_bfloat16_stays_near():
    module = make_module("immediate-x2-own").to(torch.bfloat16)
    with torch.no_grad():
        ours = module(torch.from_numpy(TOKENS))
    assert ours.dtype == torch.bfloat16
    difference = np.abs(ours.float().numpy() - jax_logits("immediate-x2-own"))
    assert difference.mean() < BF16_TOLERANCE


# ---------------------------------------------------------------- the same gradients


def jax_gradients(config):
    model = MobileLLM(config)

    def loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, TOKENS[:, :-1]))
        return -jnp.take_along_axis(log_p, TOKENS[:, 1:, None], axis=-1).mean()

    return jax.value_and_grad(loss)(random_params(config))


@pytest.mark.parametrize("kind", ["immediate-x3-first_visit", "immediate-x2-own"])
def test_gradients_are_those_of_jax_recomputed_or_not(kind):
    config = ALL_KINDS[kind]
    expected_loss, expected = jax_gradients(config)
    tokens = torch.from_numpy(TOKENS)
    for recompute in (False, True):
        module = make_module(kind)
        module.model.gradient_checkpointing = recompute
        logits = module(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        np.testing.assert_allclose(loss.item(), expected_loss, atol=GRADIENT_TOLERANCE)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.grad)
        gradients = params_from_module(config, module)
        chex.assert_trees_all_close(gradients, expected, atol=GRADIENT_TOLERANCE, rtol=0)


def test_recomputing_keeps_less_for_the_backward_pass():
    def saved_bytes(recompute):
        sizes = {}
        module = make_module("immediate-x2-own")
        module.model.gradient_checkpointing = recompute

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(torch.from_numpy(TOKENS))
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    assert saved_bytes(recompute=True) < 0.5 * saved_bytes(recompute=False)


# ---------------------------------------------------------------- weights both ways


@pytest.mark.parametrize("kind", ["reverse-x2-own", "untied", "relu"])
def test_weights_come_back_bit_for_bit_and_are_stored_once(kind):
    module = make_module(kind)
    config = ALL_KINDS[kind]
    assert sum(p.numel() for p in module.parameters()) == count_params(config)
    assert all(p.is_contiguous() and p.requires_grad for p in module.parameters())
    back = params_from_module(config, module)
    chex.assert_trees_all_equal(back, random_params(config))


def test_a_tied_head_is_one_parameter_that_learns_from_both_sides():
    module = make_module("immediate-x2-own")
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert make_module("untied").lm_head.weight is not module.model.embed_tokens.weight


def test_load_torch_reads_runs_steps_and_both_forms_of_folders(tmp_path):
    config = tiny("immediate", 2)
    params = random_params(config)
    save_params(tmp_path / "run", config, params)
    step = next((tmp_path / "run" / "checkpoints").iterdir())
    save_hf(tmp_path / "expanded", config, params)
    save_hf(tmp_path / "compact", config, params, form="compact")
    expected = module_from_params(config, params).state_dict()
    for path in (tmp_path / "run", step, tmp_path / "expanded", tmp_path / "compact"):
        state = mobilellm_jax.load_torch(path).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state), path


def test_parameters_of_another_config_are_refused():
    other = dataclasses.replace(ALL_KINDS["mha"], num_kv_heads=1)
    with pytest.raises(UserError, match="attention/key"):
        module_from_params(other, random_params(ALL_KINDS["mha"]))


# ---------------------------------------------------------------- imports


def test_without_torch_the_error_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'mobilellm_jax\[torch\]'"):
        mobilellm_jax.load_torch(tmp_path)


def test_the_code_that_goes_into_folders_needs_torch_and_transformers_only():
    allowed = {"model.py": {"torch"}, "modeling_mobilellm.py": {"torch", "transformers"}}
    for name, packages in allowed.items():
        found = set()
        for node in ast.walk(ast.parse((CODE / name).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module.split(".")[0]} if not node.level else set()
                assert not node.level or node.module == "model"
        assert found - set(sys.stdlib_module_names) == packages
