"""ExecuTorch programs in ExecuTorch's own runtime, LLM runner and C++ tokenizers."""

import dataclasses
import functools
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hf_folders import train_small_tokenizer
from model_cases import bundle, random_params, tiny
from test_tokenizer_json import ADVERSARIAL, CONTROL_LITERALS, SAMPLE, load_model, read_lines, train

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.executorch import export
from mobilellm_jax.export.executorch.export import write_pte
from mobilellm_jax.export.executorch.runtime import ExecuTorchRuntime, load_tokenizer
from mobilellm_jax.export.pytorch import module_from_params
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.tokenizers.huggingface_json import tokenizer_files
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer

NO_EXTRA = "the extra [executorch] is not installed"
pytest.importorskip("executorch", reason=NO_EXTRA)
pytest.importorskip("pytorch_tokenizers", reason=NO_EXTRA)
torch = pytest.importorskip("torch", reason=NO_EXTRA)

MAX_LOGIT_DIFFERENCE = 1e-5  # the figure of the issue, for torch and JAX alike
MAX_SHARED_TO_SINGLE_BYTES = 1.01
GREEDY_TOKENS = 128
CONTEXT = 160
NUM_PIECES = 600
FIRST_WORD = 259  # the ids before are <unk>, BOS, EOS and bytes, which may be half a character
BOS, EOS = 1, 2
EOS_IDS = (EOS, 300)  # the second is a word that the models say now and then


def small(sharing="none", num_repeats=1, shared_kv="own", **changes):
    """A model for the small tokenizer."""
    sizes = {"num_layers": 2, "vocab_size": NUM_PIECES, "max_seq_len": CONTEXT, "init_std": 0.3}
    return tiny(sharing, num_repeats, shared_kv, **sizes | changes)


# An export takes 5 s, and 3 s per visit of a block.
KINDS = {
    "immediate": small("immediate", 2, num_layers=1),
    "immediate-first_visit": small("immediate", 2, "first_visit"),
    "repeat_all-untied": small("repeat_all", 2, tie_embeddings=False),
    "reverse-mqa": small("reverse", 2, num_kv_heads=1, rope_theta=5e5, norm_eps=1e-2),
    "reverse-first_visit-relu": small("reverse", 2, "first_visit", ffn="relu"),
    "none-mha": small(num_kv_heads=4),
}
FAST = "immediate"


@functools.cache
def params_of(kind: str) -> dict:
    """Weights whose greedy text is lively and has no parts of characters."""
    params = dict(random_params(KINDS[kind]))
    speakable_V = np.arange(NUM_PIECES) >= FIRST_WORD
    if "head" in params:
        params |= {"embedding": params["embedding"] / 6, "head": params["head"] * speakable_V / 6}
    else:
        params |= {"embedding": params["embedding"] * speakable_V[:, None] / 6}
    return params


@functools.cache
def jax_logits(kind: str, tokens: tuple[int, ...]) -> np.ndarray:
    """fp32 `[T, V]`."""
    model, batch = MobileLLM(KINDS[kind]), np.array([tokens], np.int32)
    return np.asarray(model.apply({"params": params_of(kind)}, batch))[0]


@dataclasses.dataclass(frozen=True)
class Exported:
    kind: str
    folder: Path
    tokenizer: SentencePieceTokenizer
    runtime: ExecuTorchRuntime

    @property
    def tokens(self) -> tuple[int, ...]:
        """As many as the context has room for."""
        return tuple(np.random.default_rng(1).integers(0, NUM_PIECES, CONTEXT).tolist())


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """A program of a kind with its tokenizer, as in a folder that `convert` writes."""

    @functools.cache
    def export(kind: str) -> Exported:
        folder = tmp_path_factory.mktemp(kind)
        program, config, params = folder / "model.pte", KINDS[kind], params_of(kind)
        model_bytes = train_small_tokenizer(folder / "tokenizer.model")
        model = bundle(config, params, model_bytes, stop_ids=EOS_IDS)
        for name, content in tokenizer_files(model.tokenizer, CONTEXT).items():
            (folder / name).write_bytes(content)
        write_pte(program, model, context_length=CONTEXT)
        runtime = ExecuTorchRuntime(program, folder / "tokenizer.json")
        return Exported(kind, folder, SentencePieceTokenizer(model_bytes), runtime)

    return export


@pytest.fixture(
    params=[pytest.param(k, marks=[] if k == FAST else pytest.mark.slow) for k in KINDS]
)
def exported(request, export_of):
    return export_of(request.param)


@pytest.fixture
def fast(export_of):
    return export_of(FAST)


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=MAX_LOGIT_DIFFERENCE, rtol=0)


# ---------------------------------------------------------------- the program


def test_decoding_and_prompts_of_every_length_give_the_logits_of_jax_and_torch(exported):
    expected = jax_logits(exported.kind, exported.tokens)
    module = module_from_params(KINDS[exported.kind], params_of(exported.kind))
    with torch.no_grad():
        of_torch = module(torch.tensor([exported.tokens]))[0].numpy()
    decoded = exported.runtime.logits(exported.tokens)
    assert_close(decoded, expected)
    assert_close(decoded, of_torch)
    for length in range(1, CONTEXT):
        prompt = exported.tokens[:length]
        assert_close(exported.runtime.last_logits(prompt), expected[length - 1])


def test_greedy_tokens_are_those_of_jax_in_the_program_and_in_the_runner(exported):
    prompt = list(exported.tokens[: CONTEXT - GREEDY_TOKENS])
    chosen = exported.runtime.greedy(prompt, GREEDY_TOKENS)
    of_jax = jax_logits(exported.kind, (*prompt, *chosen))[len(prompt) - 1 : -1].argmax(-1)
    assert chosen == of_jax.tolist()
    assert len(set(chosen)) >= 5
    assert exported.runtime.runner_greedy(prompt, GREEDY_TOKENS) == chosen


def test_the_metadata_is_what_the_runner_reads(exported):
    assert exported.runtime.metadata == {
        "get_max_seq_len": CONTEXT,
        "get_max_context_len": CONTEXT,
        "get_vocab_size": NUM_PIECES,
        "get_bos_id": BOS,
        "get_eos_ids": list(EOS_IDS),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    assert exported.runtime.name == "ExecuTorch 1.5.1"


def test_tokens_beyond_the_context_are_a_clear_error(exported):
    runtime = exported.runtime
    full = [300] * CONTEXT
    for read in (runtime.last_logits, lambda tokens: runtime.greedy(tokens, 1)):
        with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens do not fit in its context"):
            read(full)
    assert len(runtime.logits(full)) == CONTEXT
    with pytest.raises(UserError, match=f"{CONTEXT + 2} tokens .* of {CONTEXT}; use fewer"):
        runtime.logits([300] * (CONTEXT + 2))
    assert len(runtime.runner_greedy(full[1:], 5)) == 1  # all that there is room for
    for tokens in (full, [300] * (CONTEXT + 7)):
        with pytest.raises(UserError, match="the runner failed .*context of 160 tokens"):
            runtime.runner_greedy(tokens, 1)


# ---------------------------------------------------------------- the runner


def continuation(exported: Exported, ids: list[int], num_tokens: int) -> str:
    """What sentencepiece makes of the program's greedy tokens up to the first EOS, included."""
    decode, chosen = exported.tokenizer.decode, exported.runtime.greedy(ids, num_tokens)
    end = next((n for n, token in enumerate(chosen, 1) if token in EOS_IDS), num_tokens)
    return decode(ids + chosen[:end])[len(decode(ids)) :]


def test_the_runner_gives_the_text_that_sentencepiece_decodes_with_or_without_bos(fast):
    prompt = "def parse the args"
    ids, texts = fast.tokenizer.encode(prompt), set()
    for num_bos in (0, 1):
        start = [fast.runtime.metadata["get_bos_id"]] * num_bos + ids
        expected = continuation(fast, start, 30)
        assert expected.count(" ") > 3
        for file in ("tokenizer.json", "tokenizer.model"):
            runtime = ExecuTorchRuntime(fast.folder / "model.pte", fast.folder / file)
            assert runtime.runner_text(prompt, 30, num_bos) == expected, (file, num_bos)
        texts.add(expected)
    assert len(texts) == 2  # BOS is the app's business, and it matters


def test_the_runner_stops_at_any_eos_of_the_metadata(fast):
    prompts = [[token] for token in range(FIRST_WORD, NUM_PIECES)]
    continued = ((prompt, fast.runtime.greedy(prompt, 40)) for prompt in prompts)
    prompt, chosen = next(pair for pair in continued if EOS_IDS[1] in pair[1][:-1])
    stopped = fast.runtime.runner_greedy(prompt, 40)
    assert stopped == chosen[: chosen.index(EOS_IDS[1]) + 1]


def test_the_runner_goes_on_in_the_same_context_until_it_is_reset(fast):
    """The token that it gave last it has not read: the next prompt takes its place."""
    runner = pytest.importorskip("executorch.extension.llm.runner")
    settings = runner.GenerationConfig(
        echo=False, max_new_tokens=8, temperature=0.0, warming=True, num_bos=0
    )
    files = (str(fast.folder / name) for name in ("model.pte", "tokenizer.json"))
    running = runner.TextLLMRunner(*files)

    def generate(prompt):
        pieces = []
        running.generate(prompt, settings, pieces.append)
        return "".join(pieces)

    first, second = (fast.tokenizer.encode(text) for text in ("the parser", "an argument"))
    assert generate("the parser") == continuation(fast, first, 8)
    read = first + fast.runtime.greedy(first, 8)[:-1]
    assert generate("an argument") == continuation(fast, read + second, 8)
    running.reset()
    assert generate("the parser") == continuation(fast, first, 8)


# ---------------------------------------------------------------- the C++ tokenizers


@functools.cache
def cpp_tokenizers(name: str):
    """(of tokenizer.json, of tokenizer.model, sentencepiece itself)"""
    model_bytes = load_model(name)
    with tempfile.TemporaryDirectory() as folder:
        files = tokenizer_files(SentencePieceTokenizer(model_bytes), CONTEXT)
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        loaded = [load_tokenizer(f"{folder}/tokenizer.{kind}") for kind in ("json", "model")]
    return *loaded, sentencepiece.SentencePieceProcessor(model_proto=model_bytes)


def assert_same_ids(name: str, texts) -> None:
    of_json, of_model, expected = cpp_tokenizers(name)
    for text in texts:
        ids = expected.encode(text)
        assert of_json.encode(text, 0, 0) == ids, repr(text)
        if "\0" not in text:
            assert of_model.encode(text, 0, 0) == ids, repr(text)


TOKENIZERS = pytest.mark.parametrize(
    "name",
    ["trained", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama2", "mistral_v1"))],
)


@TOKENIZERS
def test_texts_get_the_ids_of_sentencepiece(name):
    assert_same_ids(name, ADVERSARIAL)
    assert_same_ids(name, [c * n for c in " \n-=*#a0." for n in range(1, 130)])
    assert_same_ids(name, ["supercalifragilistic" * 2000, " " * 20_000, SAMPLE])
    rng = random.Random(0)
    processor = cpp_tokenizers(name)[-1]
    pieces = [processor.id_to_piece(i).replace("\u2581", " ") for i in range(259, 700)]
    pieces += ["\n", "\t", " ", "  ", "\u00e9", "\u6211", "\U0001f600", "\x07"]
    assert_same_ids(name, ["".join(rng.choices(pieces, k=rng.randrange(20))) for _ in range(4000)])
    lines = SAMPLE.splitlines()
    if name != "trained":
        lines += read_lines("c4_sample.jsonl.xz")[:5000]
        lines += read_lines("books_litbank.jsonl.xz")[:20000:4]
    assert_same_ids(name, lines)


@TOKENIZERS
def test_bos_goes_in_front_once(name):
    for tokenizer in cpp_tokenizers(name)[:2]:
        assert tokenizer.encode("a b", 1, 0) == [BOS, *tokenizer.encode("a b", 0, 0)]


@TOKENIZERS
def test_tokens_decoded_one_by_one_give_the_text_with_its_spaces(name):
    of_json, _, processor = cpp_tokenizers(name)
    text = "  two  words\nand\ta line \n"
    assert "".join(map(of_json.decode, processor.encode(text))) == " " + text


@TOKENIZERS
def test_known_exceptions_to_equal_ids(name):
    of_json, of_model, processor = cpp_tokenizers(name)
    for text in CONTROL_LITERALS:  # tokenizer.json: a literal control token becomes the token
        assert set(of_json.encode(text, 0, 0)) & {0, BOS, EOS}
        assert of_model.encode(text, 0, 0) == processor.encode(text)
    # tokenizer.json: bytes that are no UTF-8 stay those bytes, sentencepiece makes U+FFFD of them.
    assert of_json.encode(b"a\xff", 0, 0) == [*processor.encode("a"), 3 + 0xFF]
    assert of_model.encode(b"a\xff", 0, 0) == processor.encode("a\ufffd")
    # tokenizer.model: the text ends at NUL, and bytes are decoded as their names.
    assert of_model.encode("a\0b", 0, 0) == processor.encode("a")
    assert of_model.decode(3 + 0xF0) == "<0xF0>"


def test_tokenizer_model_gives_other_ids_for_unigram_models_alone(tmp_path):
    file = tmp_path / "tokenizer.model"
    for options in ({"normalization_rule_name": "nmt_nfkc"}, {"model_type": "unigram"}):
        file.write_bytes(train(**options))
        theirs = load_tokenizer(str(file))
        expected = sentencepiece.SentencePieceProcessor(str(file))
        lines = SAMPLE.splitlines()
        same = all(theirs.encode(line, 0, 0) == expected.encode(line) for line in lines)
        assert same == ("model_type" not in options)


# ---------------------------------------------------------------- size, and what is refused


def write(path, config, **options):
    write_pte(path, bundle(config), **{"context_length": 8} | options)
    return path


@pytest.mark.slow
def test_a_shared_block_is_stored_once(tmp_path):
    wide = {"num_layers": 1, "embed_dim": 384, "ffn_dim": 1024, "head_dim": 64, "num_heads": 6}
    single = write(tmp_path / "single.pte", small(**wide)).stat().st_size
    shared = write(tmp_path / "shared.pte", small("immediate", 2, **wide)).stat().st_size
    assert single < shared <= MAX_SHARED_TO_SINGLE_BYTES * single
    runtime = ExecuTorchRuntime(tmp_path / "shared.pte")
    assert runtime.metadata["get_eos_ids"] == [] and "get_bos_id" not in runtime.metadata
    assert len(runtime.runner_greedy([300], 7)) == 7


@pytest.mark.slow
def test_a_linear_layer_that_xnnpack_does_not_take_is_an_error(tmp_path, monkeypatch):
    def refuses_the_head(self, node, exported):
        return node.meta["val"].shape[-1] != NUM_PIECES

    gemm_configs = "executorch.backends.xnnpack.partition.config.gemm_configs"
    pytest.importorskip(gemm_configs)
    monkeypatch.setattr(f"{gemm_configs}.LinearConfig.check_constraints", refuses_the_head)
    with pytest.raises(AssertionError, match="XNNPACK took 7 of 8 linear layers"):
        write(tmp_path / "model.pte", small(num_layers=1))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_os_error(monkeypatch):
    class Program:
        def to_executorch(self):
            return self

        def write_to_file(self, file):
            file.write(bytes(10_000))

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(export, "_lower", lambda *_: Program())
    with pytest.raises(OSError):
        write(Path("/dev/full"), small())


def test_what_cannot_be_converted_is_refused_before_the_work(tmp_path, monkeypatch):
    path = tmp_path / "model.pte"
    for length in (0, 1, CONTEXT + 1):
        with pytest.raises(UserError, match=rf"context of {length} .* {CONTEXT}; use another"):
            write(path, small(), context_length=length)
    params = random_params(small()) | {"embedding": np.full((NUM_PIECES, 24), np.nan, np.float32)}
    with pytest.raises(UserError, match="embedding .*NaN"):
        write_pte(path, bundle(small(), params), context_length=8)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(UserError, match=r"executorch\.exir is not installed: pip .*\[executorch\]"):
        write(path, small())
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(fast, tmp_path):
    program, tokenizer = tmp_path / "model.pte", tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"model\.pte: no such file"):
        ExecuTorchRuntime(program)
    whole = (fast.folder / "model.pte").read_bytes()
    for damaged in (b"", b"no program" * 100, whole[:5000], whole[:-1000]):
        program.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.pte: not an ExecuTorch program .*again"):
            ExecuTorchRuntime(program)
    for name in ("tokenizer.json", "tokenizer.model"):
        tokenizer = tmp_path / name
        for damaged in (b"", b"{}", (fast.folder / name).read_bytes()[:3000]):
            tokenizer.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{name}: ExecuTorch cannot load this tokenizer"):
                ExecuTorchRuntime(fast.folder / "model.pte", tokenizer)
