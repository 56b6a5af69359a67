"""`.litertlm` files in LiteRT-LM itself: logits, text, ids, metadata, what is refused."""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import random
import sys

import jax
import numpy as np
import pytest
import sentencepiece
from model_cases import bundle, random_params, tiny
from test_tokenizer_json import ADVERSARIAL, CONTROL_LITERALS, SAMPLE, load_model, read_lines, train

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.litert import export
from mobilellm_jax.export.litert import runtime as litert_runtime
from mobilellm_jax.export.litert.export import write_litertlm
from mobilellm_jax.export.litert.runtime import LiteRtLmRuntime
from mobilellm_jax.export.verification import compare_logits
from mobilellm_jax.model.costs import count_params
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer

MISSING = "the extra [litert] is not installed"
litert_lm = pytest.importorskip("litert_lm", reason=MISSING)
builder = pytest.importorskip("litert_lm_builder.litertlm_builder", reason=MISSING)
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason=MISSING)
if importlib.util.find_spec("litert_torch") is None:  # importing it takes seconds
    pytest.skip(MISSING, allow_module_level=True)

# fp32 on both sides, sums in another order: 1.3e-5 was the most seen, on logits up to 5. Each side
# is up to 9e-6 from the model in float64.
MAX_LOGIT_DIFFERENCE = 5e-5
MAX_KL = 1e-10
# In JAX, rounding the weights alone gives 7e-4; LiteRT rounds activations too, 1.3e-3 in all.
MIN_INT8_KL, MAX_INT8_KL = 1e-4, 4e-3
NUM_REAL_LINES = 5000  # of each of two texts
CONTEXT = 160  # two chunks of 128 are more than that

SIZES = {"num_layers": 2, "vocab_size": 711, "max_seq_len": CONTEXT}  # 11 more than the tokenizer
KINDS = {
    "immediate": tiny("immediate", 2, embed_dim=96, ffn_dim=256, init_std=0.1, **SIZES),
    "repeat_all-untied-mqa": tiny(
        *("repeat_all", 2),
        **{"tie_embeddings": False, "num_kv_heads": 1, "rope_theta": 5e5, "norm_eps": 1e-2},
        **SIZES,
    ),
    "reverse-mha": tiny("reverse", 2, num_kv_heads=4, **SIZES),
}
PLAIN = tiny(**SIZES)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [/]{% endfor %}"
EOS = 2


@functools.cache
def unigram():
    """A tokenizer that neither transformers nor llama.cpp would take from us."""
    return train(model_type="unigram")


@functools.cache
def processor_of(kind):
    model = unigram() if kind == "reverse-mha" else load_model("trained")
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def params_of(kind):
    params = random_params(KINDS[kind])
    if "head" in params:  # says EOS rather often
        head = params["head"] * (1 + (np.arange(KINDS[kind].vocab_size) == EOS))
        params = params | {"head": head.astype(np.float32)}
    return params


def write(path, config, params, **options):
    options = {"tokenizer_model": load_model("trained")} | options
    settings = {"weight_type": "fp32", "context_length": CONTEXT}
    settings |= {name: options.pop(name) for name in settings if name in options}
    write_litertlm(path, bundle(config, params, **options), **settings)


def path_of(folder, name):
    return folder / f"{name}.litertlm"  # LiteRT-LM goes by the end of the name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All conversions, two at a time: each is a process that keeps one core busy."""
    folder = tmp_path_factory.mktemp("litert")
    options = {
        "immediate": {},
        "repeat_all-untied-mqa": {"context_length": 64, "chat_template": CHAT_TEMPLATE},
        "reverse-mha": {"context_length": 33, "tokenizer_model": unigram()},
        "int8": {"weight_type": "int8"},
    }

    def convert(name):
        kind = name if name in KINDS else "immediate"
        write(path_of(folder, name), KINDS[kind], params_of(kind), **options[name])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(convert, options))
    return folder


@pytest.fixture(scope="module")
def open_kind(folder):
    return functools.cache(lambda kind: LiteRtLmRuntime(path_of(folder, kind)))


@functools.cache
def forward(kind):
    model = MobileLLM(KINDS[kind])
    return jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT))


@functools.cache
def random_tokens_and_logits(kind):
    tokens = np.random.default_rng(1).integers(0, KINDS[kind].vocab_size, CONTEXT)
    tokens[7] = 0  # which litert-torch takes for padding
    return tokens, np.asarray(forward(kind)(params_of(kind), tokens[None]))[0]


def jax_greedy(kind, prompts, num_tokens, context=CONTEXT, vocab_size=None):
    """The likeliest continuations of ids below `vocab_size`, to EOS or the end of the context."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(num_tokens):
        padded = np.zeros((len(rows), CONTEXT), np.int32)
        for row, tokens in zip(padded, rows, strict=True):
            row[: len(tokens)] = tokens
        chosen = np.asarray(forward(kind)(params_of(kind), padded))[..., :vocab_size].argmax(-1)
        for tokens, row, prompt in zip(rows, chosen, prompts, strict=True):
            if len(tokens) < context and EOS not in tokens[len(prompt) :]:
                tokens.append(int(row[len(tokens) - 1]))
    return [tokens[len(prompt) :] for tokens, prompt in zip(rows, prompts, strict=True)]


def jax_says(kind, prompts, num_tokens, context=CONTEXT):
    """What the Engine should say; its Python interface cuts a text off at a NUL."""
    processor = processor_of(kind)
    rows = jax_greedy(kind, prompts, num_tokens, context, processor.vocab_size())
    texts = (processor.decode([token for token in row if token != EOS]) for row in rows)
    return [text.partition("\0")[0] for text in texts]


def prompts_by_length(processor, lengths):
    """Texts by their number of tokens, BOS included; not every number has one."""
    texts = (SAMPLE[3000:end] for end in range(3000, 3600))
    found = {1 + len(processor.encode(text)): text for text in texts}
    return {n: found[n] for n in lengths if n in found}


# ---------------------------------------------------------------- the model


@pytest.mark.slow
@EVERY_KIND
def test_logits_are_those_of_jax_one_at_a_time_and_by_prompts_of_every_length(kind, open_kind):
    runtime, (tokens, expected) = open_kind(kind), random_tokens_and_logits(kind)
    context = runtime.context_length
    tokens, expected = tokens[:context], expected[:context]
    prompts = np.stack([runtime.last_logits(tokens[:n]) for n in range(1, context + 1)])
    for found in (runtime.logits(tokens), prompts):
        compared = compare_logits(expected, found)
        assert compared.logits < MAX_LOGIT_DIFFERENCE
        assert compared.mean_kl < MAX_KL
        assert compared.argmax == 1
    with pytest.raises(UserError, match=f"{context + 1} tokens do not fit"):
        runtime.logits([*tokens, 5])


@pytest.mark.slow
@EVERY_KIND
def test_greedy_ids_are_those_of_jax(kind, open_kind):
    runtime, (tokens, _) = open_kind(kind), random_tokens_and_logits(kind)
    prompt, num_tokens = tokens[:9].tolist(), runtime.context_length - 9
    (expected,) = jax_greedy(kind, [prompt], num_tokens)
    found = runtime.greedy(prompt, num_tokens)
    assert found[: len(expected)] == expected and len(found) == num_tokens  # no stop at EOS
    with pytest.raises(UserError, match="do not fit"):
        runtime.greedy(prompt, num_tokens + 1)


@pytest.mark.slow
@EVERY_KIND
def test_the_engine_says_what_jax_says_for_prompts_of_every_length(kind, open_kind):
    runtime, processor = open_kind(kind), processor_of(kind)
    context = runtime.context_length
    prompts = prompts_by_length(processor, range(1, context))
    assert len(prompts) > 0.9 * context and max(prompts) == context - 1
    ids = [[1, *processor.encode(text)] for text in prompts.values()]
    expected = jax_says(kind, ids, 4, context)
    for text, continuation in zip(prompts.values(), expected, strict=True):
        assert runtime.greedy_text(text, 4) == continuation, repr(text)
    if kind == "repeat_all-untied-mqa":
        assert any(EOS in row[1:] for row in jax_greedy(kind, ids, 4, context))


@pytest.mark.slow
def test_the_engine_fills_the_context_and_refuses_longer_prompts(open_kind):
    runtime, processor = open_kind("immediate"), processor_of("immediate")
    prompts = prompts_by_length(processor, [100, CONTEXT, CONTEXT + 1])
    ids = [1, *processor.encode(prompts[100])]
    (expected,) = jax_says("immediate", [ids], CONTEXT - 100)
    assert runtime.greedy_text(prompts[100], 1000) == expected
    for length in (CONTEXT, CONTEXT + 1):
        with pytest.raises(UserError, match=f"context is {CONTEXT} tokens"):
            runtime.greedy_text(prompts[length], 1)


@pytest.mark.slow
def test_int8_is_near_jax_on_the_weights_before_rounding(open_kind):
    tokens, expected = random_tokens_and_logits("immediate")
    compared = compare_logits(expected, open_kind("int8").logits(tokens))
    assert MIN_INT8_KL < compared.mean_kl < MAX_INT8_KL


# ---------------------------------------------------------------- the file


def weight_bytes(path):
    """Bytes of all constants of the model in a file."""
    model = schema.ModelT.InitFromPackedBuf(litert_runtime._model_section(path), 0)
    return sum(len(b.data) for b in model.buffers if b.data is not None and len(b.data) > 64)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [*((kind, 4) for kind in KINDS), ("int8", 1)])
def test_shared_blocks_and_a_tied_head_are_stored_once(name, size, folder):
    stored = weight_bytes(path_of(folder, name))
    assert 1 <= stored / (size * count_params(KINDS.get(name, KINDS["immediate"]))) < 1.02


@pytest.mark.slow
def test_metadata_has_bos_eos_and_context(folder, open_kind):
    engine = open_kind("immediate")._engine
    assert (engine.bos_token_id, engine.eos_token_ids) == (1, [[EOS]])
    with litert_lm.ModelInfo(path_of(folder, "immediate")) as info:
        assert info.max_context_tokens == CONTEXT


@pytest.mark.slow
def test_the_engine_stops_at_every_stop_id_of_the_model(tmp_path):
    """One of them is no EOS, one has no piece: an added token behind those of tokenizer.model."""
    config = dataclasses.replace(KINDS["repeat_all-untied-mqa"], vocab_size=701)
    params, often = dict(random_params(config)), np.ones(701, np.float32)
    often[[305, 700]] = 4, 3
    params["head"] = params["head"] * often
    stops = (EOS, 305, 700)
    write(tmp_path / "m.litertlm", config, params, stop_ids=stops)
    runtime, ends = LiteRtLmRuntime(tmp_path / "m.litertlm"), set()
    for text in ("def main():", "import sys", "class A", "return x", "for i in", "the", "a", "if"):
        said = runtime.greedy([1, *processor_of("immediate").encode(text)], 40)
        end = next((place for place, token in enumerate(said) if token in stops), 40)
        ends |= set(said[end : end + 1])
        expected = processor_of("immediate").decode(said[:end])
        assert runtime.greedy_text(text, 40) == expected.partition("\0")[0]
    assert ends == {305, 700}


@pytest.mark.slow
def test_a_conversation_follows_the_chat_template(open_kind):
    kind = "repeat_all-untied-mqa"
    sampler = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
    with open_kind(kind)._engine.create_conversation(
        sampler_config=sampler, max_output_tokens=8
    ) as conversation:
        said = str(conversation.send_message("import sys"))
    ids = [1, *processor_of(kind).encode("[user] import sys [/]")]
    assert [said] == jax_says(kind, [ids], 8)


@pytest.mark.slow
def test_the_conversion_leaves_this_process_and_the_folder_as_they_were(folder):
    assert {path.stem for path in folder.iterdir()} == {*KINDS, "int8"}
    assert not {"litert_torch.generative", "tensorflow"} & sys.modules.keys()


# ---------------------------------------------------------------- ids


@pytest.fixture(scope="module")
def open_tokenizer(folder, tmp_path_factory):
    """The smallest file, with another tokenizer put into it."""

    @functools.cache
    def make(name):
        parts = tmp_path_factory.mktemp("parts")
        ours = SentencePieceTokenizer(load_model(name))
        model = litert_runtime._model_section(path_of(folder, "reverse-mha"))
        (parts / "tflite").write_bytes(model)
        (parts / "spiece").write_bytes(ours.model_bytes)
        with_tokenizer = bundle(PLAIN, {}, ours.model_bytes)
        (parts / "metadata").write_bytes(export._llm_metadata(with_tokenizer, CONTEXT))
        made = builder.LitertLmFileBuilder()
        made.add_system_metadata(builder.Metadata("Authors", "test", builder.DType.STRING))
        made.add_llm_metadata(str(parts / "metadata"))
        made.add_sentencepiece_tokenizer(str(parts / "spiece"))
        made.add_tflite_model(str(parts / "tflite"), builder.TfLiteModelType.PREFILL_DECODE)
        with open(path_of(parts, name), "wb") as file:
            made.build(file)
        return LiteRtLmRuntime(path_of(parts, name)), ours

    return make


def random_texts():
    rng = random.Random(0)
    points = [*range(1, 0x300), *range(0x2000, 0x2700), *range(0x1F600, 0x1F650)]
    return [
        *("".join(map(chr, rng.choices(points, k=rng.randrange(30)))) for _ in range(1000)),
        *(rng.randbytes(rng.randrange(30)).decode(errors="replace") for _ in range(1000)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", "llama2", "mistral_v1"])
def test_ids_are_those_of_sentencepiece(name, open_tokenizer):
    runtime, ours = open_tokenizer(name)
    lines = SAMPLE.splitlines()
    if name != "trained":
        lines += read_lines("c4_sample.jsonl.xz")[:NUM_REAL_LINES]
        lines += read_lines("books_litbank.jsonl.xz")[: 4 * NUM_REAL_LINES : 4]
    runs = [c * n for c in " \n-=*#a0." for n in range(1, 130)]
    for text in [*ADVERSARIAL, *CONTROL_LITERALS, *lines, *runs, *random_texts(), SAMPLE[:20000]]:
        if "\0" not in text:
            assert runtime.encode(text) == ours.encode(text), repr(text)


@pytest.mark.slow
def test_known_exception_texts_that_the_python_interface_cannot_hand_over(open_kind):
    with pytest.raises(UserError, match="NUL"):
        open_kind("immediate").encode("a\0b")
    with pytest.raises(UserError, match="cannot be encoded as UTF-8"):
        open_kind("immediate").encode(b"a\xff b".decode(errors="surrogateescape"))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["<s>b", "<s> b", "a<s>b", "</s>b", "<unk>", "a\0b", ""])
def test_known_exception_a_prompt_that_begins_with_bos_in_letters(text, open_kind):
    """LiteRT-LM makes it the token, behind the one that it adds; other marks are characters."""
    rest = text.removeprefix("<s>")
    ids = [1, *([1] if rest != text else []), *processor_of("immediate").encode(rest)]
    (expected,) = jax_says("immediate", [ids], 8)
    assert open_kind("immediate").greedy_text(text, 8) == expected


# ---------------------------------------------------------------- what is refused


NOT_FINITE = {"final_norm": {"scale": np.full(24, np.nan, np.float32)}}


@pytest.mark.parametrize(
    ("config", "changes", "options", "message"),
    [
        (tiny("repeat_all", 2, ffn="relu", **SIZES), {}, {}, "relu"),
        (tiny("immediate", 2, "first_visit", **SIZES), {}, {}, "first_visit"),
        (PLAIN, NOT_FINITE, {}, "final_norm/scale .*NaN"),
        (PLAIN, {}, {"tokenizer_model": None}, "cannot be without a tokenizer"),
        (PLAIN, {}, {"tokenizer_model": train(eos_id=-1)}, "has no EOS"),
        (PLAIN, {}, {"stop_ids": (2, 705)}, "id 705, for which .* no piece.* 10 unused ids"),
        (PLAIN, {}, {"context_length": CONTEXT + 1}, f"max_seq_len, {CONTEXT}"),
        (PLAIN, {}, {"context_length": 1}, "context_length = 1 is out of range"),
        (PLAIN, {}, {"weight_type": "int4"}, "weight_type = 'int4': use one of fp32, int8"),
        (tiny(**SIZES | {"vocab_size": 699}), {}, {}, "700 pieces"),
        (PLAIN, {}, {"tokenizer_model": b"no tokenizer"}, "not a SentencePiece model"),
    ],
)
def test_what_the_format_cannot_express_is_refused(config, changes, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "model.litertlm", config, random_params(config) | changes, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("echo 'OSError: No space left on device' >&2; exit 1", "No space left"),
        ("kill -9 $$", "lack of memory"),
        ("exit 3", "no message"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(program, message, tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\n" + program)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=f"model.litertlm: litert-torch could not .*{message}"):
        write(tmp_path / "model.litertlm", PLAIN, random_params(PLAIN))
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(UserError, match=r"pip install 'mobilellm_jax\[litert\]'"):
        write(tmp_path / "model.litertlm", PLAIN, random_params(PLAIN))


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 1000])
def test_other_files_are_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"x: no \.litertlm file"):
        LiteRtLmRuntime(tmp_path / "x")


@pytest.mark.slow
def test_a_file_without_its_end_is_refused(folder, tmp_path):
    content = path_of(folder, "immediate").read_bytes()
    path_of(tmp_path, "x").write_bytes(content[:-1000])
    runtime = LiteRtLmRuntime(path_of(tmp_path, "x"))
    with pytest.raises(UserError, match="no complete model"):
        runtime.logits([1])
    with pytest.raises(UserError, match="Failed to create LiteRT-LM engine"):
        runtime.encode("a")
