"""The comparison of a converted model with the JAX model finds what is wrong, and nothing else."""

import dataclasses
import re
import tracemalloc

import jax
import numpy as np
import pytest
from hf_folders import train_small_tokenizer
from model_cases import bundle, random_params, tiny

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.formats import Tolerance
from mobilellm_jax.export.report import verification_table
from mobilellm_jax.export.verification import _prompt_lengths, _window, compare_logits, verify
from mobilellm_jax.inference.generate import generate_tokens
from mobilellm_jax.inference.sampling import Sampling
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.model_bundle import PromptFormat
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer

TOLERANCE = Tolerance(mean_kl=1e-5, logits=1e-4)
CONFIG = tiny("immediate", 2, vocab_size=608, max_seq_len=24)
TEXT = "The quick brown fox jumps over the lazy dog.\n\nA second line, and a third.\n" * 4
FORWARD = jax.jit(lambda params, tokens: MobileLLM(CONFIG).apply({"params": params}, tokens))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "tokenizer.model"
    return SentencePieceTokenizer(train_small_tokenizer(path))


class RuntimeInJax:
    """Stands for a runtime: the model itself, with a mistake if one is asked for."""

    name, context_length, has_tokenizer = "the JAX model", CONFIG.max_seq_len, True

    def __init__(self, tokenizer, params=None, last=lambda logits: logits, pieces=None):
        self._params = params or random_params(CONFIG)
        self._tokenizer, self._last, self._pieces = tokenizer, last, pieces

    def logits(self, tokens):
        padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(FORWARD(self._params, padded))[0, : len(tokens)]

    def last_logits(self, tokens):
        return self._last(self.logits(tokens)[-1])

    def greedy(self, tokens, num_tokens):
        steps = generate_tokens(
            CONFIG, self._params, [tokens], max_tokens=num_tokens, sampling=Sampling(temperature=0)
        )
        return [int(step[0]) for step in steps]

    def stops_at(self, token):
        return token == self._tokenizer.eos_id

    def encode(self, text):
        return self._tokenizer.encode(self._pieces(text) if self._pieces else text)


def run(runtime, tokenizer, tolerance=TOLERANCE, params=None, text=TEXT):
    model = dataclasses.replace(bundle(CONFIG, params, bos=True), tokenizer=tokenizer)
    return verify(model, runtime, tolerance, text=text, text_name="a text")


def test_the_same_model_passes_at_every_prompt_length(tokenizer):
    result = run(RuntimeInJax(tokenizer), tokenizer)
    assert result.problems == []
    assert result.prompt_lengths == tuple(range(1, CONFIG.max_seq_len))
    assert result.decoded.positions == CONFIG.max_seq_len
    assert result.greedy_equal == result.greedy_tokens > 8
    assert result.lines_equal == result.lines == 8
    assert result.greedy_text.startswith("The quick")


def test_what_is_read_is_the_text_behind_bos(tokenizer):
    ids = tokenizer.encode(TEXT)
    model = dataclasses.replace(bundle(CONFIG, bos=True), tokenizer=tokenizer)
    behind_bos = _window(model, TEXT, "a text", 12)
    assert behind_bos == [tokenizer.bos_id, *ids[:11]]
    without_bos = dataclasses.replace(model, prompt=PromptFormat(bos=False))
    assert _window(without_bos, TEXT, "a text", 12) == ids[:12]


def test_long_contexts_are_tried_around_powers_of_two_and_to_their_end():
    around = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]
    assert _prompt_lengths(100) == [*around, 99]
    assert _prompt_lengths(64) == list(range(1, 64))


def test_other_weights_are_found_by_every_figure(tokenizer):
    other = RuntimeInJax(tokenizer, random_params(CONFIG, seed=1))
    problems = "\n".join(run(other, tokenizer).problems)
    for part in ("token by token: mean KL", "a logit differs", "argmax differ", "greedy tokens"):
        assert part in problems


def test_an_error_in_prompts_alone_is_found(tokenizer):
    off = RuntimeInJax(tokenizer, last=lambda logits: logits + 2e-4)
    (problem,) = run(off, tokenizer).problems
    assert problem.startswith("prompts: a logit differs by 2.0")


def test_logits_that_are_not_numbers_are_found(tokenizer):
    broken = RuntimeInJax(tokenizer, last=lambda logits: np.full_like(logits, np.nan))
    assert any("prompts" in problem for problem in run(broken, tokenizer).problems)


def test_other_ids_are_found(tokenizer):
    lower = RuntimeInJax(tokenizer, pieces=str.lower)
    assert run(lower, tokenizer).problems == ["ids differ in 8 of 8 lines"]


def test_a_stop_id_at_which_the_runtime_goes_on_is_found(tokenizer):
    model = bundle(CONFIG, bos=True, stop_ids=(13, tokenizer.eos_id))
    model = dataclasses.replace(model, tokenizer=tokenizer)
    result = verify(model, RuntimeInJax(tokenizer), TOLERANCE, text=TEXT, text_name="a text")
    assert result.problems == ["does not stop at the ids [13]"]


def test_lines_that_spell_out_a_special_token_are_left_out(tokenizer):
    like_hugging_face = RuntimeInJax(tokenizer, pieces=lambda text: re.sub("</?s>|<unk>", "", text))
    text = "a <s> b\n</s>\nx<unk>y\n" + TEXT
    result = run(like_hugging_face, tokenizer, text=text)
    assert result.problems == [] and result.lines_equal == result.lines == 8


def test_without_a_tokenizer_in_the_runtime_no_ids_are_compared(tokenizer):
    runtime = RuntimeInJax(tokenizer, pieces=str.lower)
    runtime.has_tokenizer = False
    result = run(runtime, tokenizer)
    assert result.problems == [] and (result.has_tokenizer, result.lines) == (False, 0)
    assert "Tokenizer: none that the runtime reads, so no ids were compared." in (
        verification_table(result)
    )


def test_a_tie_is_no_mistake_and_a_wrong_choice_is_one():
    expected = np.array([[1.0, 1.00001, 0.0], [3.0, 2.0, 1.0]])
    swapped = np.array([[1.00001, 1.0, 0.0], [3.0, 2.0, 1.0]])
    tie = compare_logits(expected, swapped, 1e-4)
    assert (tie.argmax, tie.wrong) == (0.5, 0)
    wrong = compare_logits(expected, expected[:, [2, 0, 1]], 1e-4)
    assert (wrong.argmax, wrong.wrong) == (0.0, 2)


def test_a_tie_is_within_twice_the_tolerance_of_a_logit():
    """Each of the two logits may be off by the tolerance, by no more."""
    expected = np.array([[1.0, 1.0 - 1.9e-4], [1.0, 1.0 - 2.1e-4]])
    swapped = compare_logits(expected, expected[:, ::-1], 1e-4)
    assert (swapped.argmax, swapped.wrong) == (0.0, 1)


class SecondChoice(RuntimeInJax):
    """Its greedy continuation begins with the second likeliest token; its logits are right."""

    def greedy(self, tokens, num_tokens):
        _, second = np.argsort(-self.logits(tokens)[-1])[:2]
        return [int(second), *super().greedy([*tokens, int(second)], num_tokens - 1)]


def test_a_greedy_token_is_a_tie_within_twice_the_tolerance(tokenizer):
    runtime = SecondChoice(tokenizer)
    prompt = tokenizer.encode(TEXT, bos=True)[: CONFIG.max_seq_len // 2]
    second, first = np.sort(runtime.logits(prompt)[-1])[-2:]
    gap = float(first - second)
    # Without a tolerance the measured difference counts, here none.
    for tolerance, is_tie in ((0.6 * gap, True), (0.4 * gap, False), (None, False)):
        result = run(runtime, tokenizer, Tolerance(mean_kl=1e-5, logits=tolerance))
        assert (result.greedy_equal, result.greedy_is_tie) == (0, is_tie)
        assert result.problems == ([] if is_tie else ["greedy tokens differ from number 1 on"])


def test_kl_is_that_of_the_two_distributions():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.125, 0.125, 0.75]])
    expected = 0.5 * np.log(4) + 0.25 * np.log(2) + 0.25 * np.log(1 / 3)  # not that of q from p
    shifted = compare_logits(np.log(p) + 3.0, np.log(q) - 1.0)
    np.testing.assert_allclose(shifted.mean_kl, expected, rtol=1e-12)


def test_many_rows_are_compared_like_single_ones_in_little_memory():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(500, 2000)).astype(np.float32)
    got = expected + rng.normal(size=expected.shape).astype(np.float32)
    tracemalloc.start()
    whole = compare_logits(expected, got, 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * expected.nbytes  # at once, in float64, it takes 12 times as much and more
    pairs = zip(expected[:, None], got[:, None], strict=True)
    rows = [compare_logits(*pair, 0.1) for pair in pairs]
    assert whole.positions == 500 and 0 < whole.argmax < 1
    assert whole.logits == max(row.logits for row in rows)
    assert whole.wrong == sum(row.wrong for row in rows)
    np.testing.assert_allclose(whole.mean_kl, np.mean([row.mean_kl for row in rows]), rtol=1e-12)
    np.testing.assert_allclose(whole.argmax, np.mean([row.argmax for row in rows]), rtol=1e-12)


def test_a_format_that_rounds_is_held_to_kl_only(tokenizer):
    loose = dataclasses.replace(TOLERANCE, mean_kl=1e9, logits=None, exact=False)
    assert run(RuntimeInJax(tokenizer, random_params(CONFIG, 1)), tokenizer, loose).problems == []


def test_a_text_shorter_than_the_context_of_both_is_refused(tokenizer):
    runtime = RuntimeInJax(tokenizer)
    runtime.context_length = 12
    message = "a text: has .* wants the context of 12; name a longer --text"
    with pytest.raises(UserError, match=message):
        run(runtime, tokenizer, text="short")
