"""Generation: what comes out equals a plain loop over the full model, however it is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import random_params, tiny
from prepared import DOCUMENTS

from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import generate as generation
from mobilellm_jax.inference.generate import generate, generate_tokens
from mobilellm_jax.inference.sampling import NO_NUMBERS, Sampling, sample
from mobilellm_jax.model.decoding import decode_weights
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.model_bundle import ModelBundle, PromptFormat
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

CONFIG = tiny("repeat_all", 2)
PARAMS = random_params(CONFIG, 3)
PROMPTS = [[5, 1, 9], [7], [3, 3, 8, 20, 41, 2]]
GREEDY = Sampling(temperature=0)
FULL_PASS = jax.jit(MobileLLM(CONFIG).apply)  # causal: what stands behind a position is not seen


def tokens_of(prompts, **options):
    options = {"max_tokens": 6, "sampling": GREEDY} | options
    return np.stack(list(generate_tokens(CONFIG, PARAMS, prompts, **options)), axis=1)


def plain_greedy(prompt, count):
    tokens = np.zeros((1, CONFIG.max_seq_len), np.int32)
    tokens[0, : len(prompt)] = prompt
    for position in range(len(prompt), len(prompt) + count):
        logits = FULL_PASS({"params": PARAMS}, tokens)
        tokens[0, position] = logits[0, position - 1].argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


def test_greedy_equals_a_plain_loop_for_prompts_of_different_lengths():
    expected = [plain_greedy(prompt, 6) for prompt in PROMPTS]
    np.testing.assert_array_equal(tokens_of(PROMPTS), expected)


def test_rows_do_not_depend_on_their_neighbours():
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    together = tokens_of(PROMPTS, sampling=sampling, seed=4)
    other_neighbours = tokens_of([PROMPTS[0], [1] * 9, PROMPTS[2]], sampling=sampling, seed=4)
    np.testing.assert_array_equal(together[[0, 2]], other_neighbours[[0, 2]])


def test_seed_decides_the_text():
    sampling = Sampling(temperature=1.0)
    first = tokens_of(PROMPTS, sampling=sampling, seed=1)
    np.testing.assert_array_equal(first, tokens_of(PROMPTS, sampling=sampling, seed=1))
    assert not np.array_equal(first, tokens_of(PROMPTS, sampling=sampling, seed=2))


def test_every_token_is_drawn_anew():
    """All tokens are equally likely without weights: one draw for all would repeat itself."""
    nothing = jax.tree.map(np.zeros_like, PARAMS)
    settings = {"max_tokens": 6, "sampling": Sampling(temperature=1.0)}
    drawn = np.stack(list(generate_tokens(CONFIG, nothing, PROMPTS, **settings)), axis=1)
    assert min(len(set(row)) for row in drawn.tolist()) >= 4


def test_a_row_stops_at_eos_and_the_others_go_on():
    free = tokens_of(PROMPTS)
    eos = int(free[0, 2])
    stopped = tokens_of(PROMPTS, stop_ids=frozenset({eos}))
    for row in range(len(PROMPTS)):
        where = np.flatnonzero(free[row] == eos)
        end = where[0] + 1 if len(where) else free.shape[1]
        np.testing.assert_array_equal(stopped[row, :end], free[row, :end])
        assert (stopped[row, end:] == -1).all()
    assert (stopped[0, 3:] == -1).all()


def test_generation_ends_when_every_row_has_stopped():
    eos = plain_greedy(PROMPTS[0], 1)[0]
    assert tokens_of(PROMPTS[:1], max_tokens=50, stop_ids=frozenset({eos})).shape == (1, 1)


def test_generation_ends_at_the_context():
    prompt = [1] * (CONFIG.max_seq_len - 3)
    assert tokens_of([prompt], max_tokens=50).shape == (1, 3)
    np.testing.assert_array_equal(tokens_of([prompt], max_tokens=50)[0], plain_greedy(prompt, 3))


def test_weights_laid_out_before_give_the_same_tokens():
    weights = decode_weights(PARAMS, "float32", num_rows=len(PROMPTS))
    np.testing.assert_array_equal(tokens_of(PROMPTS, weights=weights), tokens_of(PROMPTS))


def test_a_single_token_lays_nothing_out_for_decoding(monkeypatch):
    name = "mobilellm_jax.inference.generate.decode_weights"
    monkeypatch.setattr(name, lambda *_, **__: pytest.fail("laid out"))
    assert tokens_of(PROMPTS, max_tokens=1).shape == (len(PROMPTS), 1)


def test_tokens_come_as_they_are_made():
    stream = generate_tokens(CONFIG, PARAMS, PROMPTS, max_tokens=3, sampling=GREEDY)
    assert next(stream).shape == (3,)
    assert len(list(stream)) == 2


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([[1], []], "prompt 2 is empty"),
        ([[1] * 64], "prompt 1 has 64 tokens, the context of the model holds 64"),
        ([[53]], "token id 53, the vocabulary has 53"),
        ([[-1]], "token id -1"),
    ],
)
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        tokens_of(prompts)


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_token_is_refused(count):
    with pytest.raises(UserError, match=f"max_tokens = {count}: use 1 or more"):
        tokens_of(PROMPTS, max_tokens=count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
    ],
)
def test_bad_sampling_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


FIVE = np.log([0.4, 0.3, 0.2, 0.06, 0.04])


def frequencies(sampling, logits=FIVE, draws=20_000):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    chosen = sample(rows, jax.random.split(jax.random.key(0), draws), sampling)
    return np.bincount(chosen, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(temperature=0.5), np.array([0.16, 0.09, 0.04, 0.0036, 0.0016]) / 0.2952),
        (Sampling(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=9), [0.4, 0.3, 0.2, 0.06, 0.04]),
        # 0.4 + 0.3 < 0.75: the third token is needed to reach it, the fourth is not.
        (Sampling(temperature=1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0, 0]),
    ],
)
def test_samples_follow_the_distribution(sampling, expected):
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.015)
    assert (frequencies(sampling)[np.asarray(expected) == 0] == 0).all()


def distribution(logits, sampling):
    """The probabilities of the tokens, computed in float64 without any of the code under test."""
    logits = np.asarray(logits, np.float32).astype(np.float64)
    if sampling.temperature < 1e-6:
        return np.eye(len(logits))[logits.argmax()]
    exponentials = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-logits, kind="stable")
    kept = order[: sampling.top_k or None]
    probabilities = exponentials[kept] / exponentials[kept].sum()
    needed = 1 + np.count_nonzero(np.cumsum(probabilities)[:-1] < sampling.top_p)
    kept = kept[:needed]
    result = np.zeros(len(logits))
    result[kept] = exponentials[kept] / exponentials[kept].sum()
    return result


SPREAD = np.random.default_rng(0).normal(size=40) * 3


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 9e-7, 1.1e-6, 0.7, 1e30, 1e300])
@pytest.mark.parametrize(
    "logits",
    [SPREAD, SPREAD * 1e20, SPREAD * 1e-30, np.where(SPREAD < 0, -np.inf, SPREAD)],
    ids=["usual", "huge", "tiny", "masked"],
)
def test_extreme_settings_give_the_distribution_of_float64(logits, temperature):
    for top_k, top_p in [(0, 1e-50), (1, 1.0), (7, 0.31), (10**20, 0.96)]:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        expected = distribution(logits, sampling)
        found = frequencies(sampling, logits, draws=2000)
        assert (found[expected == 0] == 0).all()
        np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_choose_no_token(bad, temperature):
    rows = jnp.array([[1.0, 2.0, 3.0], [1.0, bad, 3.0], [-np.inf] * 3, [-np.inf, 2.0, -np.inf]])
    sampling = Sampling(temperature=temperature, top_k=2, top_p=0.1)
    chosen = sample(rows, jax.random.split(jax.random.key(0), 4), sampling)
    assert chosen.tolist() == [2, NO_NUMBERS, NO_NUMBERS, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda scale: scale.at[0].set(np.nan), "weights final_norm/scale hold NaN or Inf"),
        (lambda scale: jnp.full_like(scale, 3e38), "logits are NaN or infinite: .* float32"),
    ],
)
def test_weights_that_give_no_numbers_are_an_error_at_the_first_token(damage, message):
    norm = {"scale": damage(jnp.asarray(PARAMS["final_norm"]["scale"]))}
    stream = generate_tokens(
        CONFIG, PARAMS | {"final_norm": norm}, PROMPTS, max_tokens=3, sampling=GREEDY
    )
    with pytest.raises(UserError, match=message):
        next(stream)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(DOCUMENTS, 300, tmp_path_factory.mktemp("t") / "tokenizer.model")


def text_of(tokenizer, chosen, monkeypatch, **options):
    """Pieces, text and what `generate_tokens` was asked for, if that chose these tokens."""
    pieces, asked = [], {}

    def generate_tokens(config, params, ids, **settings):
        asked.update(settings, ids=ids)
        return (np.array([token]) for token in chosen)

    monkeypatch.setattr(generation, "generate_tokens", generate_tokens)
    model = ModelBundle(
        config=tiny(vocab_size=tokenizer.vocab_size + 8),
        params={},
        tokenizer=tokenizer,
        prompt=PromptFormat(**options),
    )
    (text,) = generate(
        model,
        ["the"],
        max_tokens=len(chosen),
        sampling=GREEDY,
        on_text=lambda _, piece: pieces.append(piece),
    )
    return pieces, text, asked


def test_half_a_character_is_held_back_until_it_is_whole_or_the_end(tokenizer, monkeypatch):
    day = tokenizer.encode("日")[-3:]  # three bytes
    without_piece = tokenizer.vocab_size + 1
    pieces, text, _ = text_of(tokenizer, [*day, without_piece, day[0]], monkeypatch)
    assert (pieces, text) == (["日", "\ufffd"], "日\ufffd")


@pytest.mark.parametrize("bos", [True, False])
def test_prompts_begin_as_documents_did_and_rows_end_at_eos(tokenizer, monkeypatch, bos):
    (cat,) = tokenizer.encode("cat")
    pieces, text, asked = text_of(tokenizer, [cat, tokenizer.eos_id], monkeypatch, bos=bos)
    assert (pieces, text) == ([" cat"], " cat")
    assert asked["ids"] == [[tokenizer.bos_id] * bos + tokenizer.encode("the")]
    assert asked["stop_ids"] == {tokenizer.eos_id}


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    model = ModelBundle(config=CONFIG, params=PARAMS, tokenizer=tokenizer)
    with pytest.raises(UserError, match="has 300 pieces, but the model's vocab_size is 53"):
        generate(model, ["the"], max_tokens=1, sampling=GREEDY)


def test_streamed_pieces_make_up_the_text(tokenizer):
    config = tiny(vocab_size=tokenizer.vocab_size)
    params = random_params(config)
    pieces = ["", ""]

    def collect(row, piece):
        pieces[row] += piece

    texts = generate(
        ModelBundle(config=config, params=params, tokenizer=tokenizer),
        [DOCUMENTS[0][:20], "日本"],
        max_tokens=30,
        sampling=Sampling(temperature=1.5),
        on_text=collect,
    )
    assert pieces == texts and all(texts)
