"""A converted model, run by its own runtime, against the JAX model on real text."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.formats import Tolerance
from mobilellm_jax.export.runtime import Runtime
from mobilellm_jax.inference.generate import generate_tokens
from mobilellm_jax.inference.sampling import Sampling
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.tokenizers.huggingface_json import special_pieces
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

_DECODED = 256  # tokens that are read one at a time
_CONTINUED = 128  # tokens of greedy continuation
_GREEDY_PROMPT = 16
_LINES = 200  # lines of text whose ids are compared
_ROWS = 64  # of logits that are compared at once; in float64 the whole takes gigabytes


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Figures over a number of positions: `logits` and `mean_kl` as in `Tolerance`."""

    positions: int
    logits: float
    mean_kl: float
    argmax: float  # share of positions with the same likeliest token
    wrong: int  # positions with another likeliest token that is no tie


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was measured, and what was asked for.

    Attributes:
      runtime: name and version of the software that ran the model.
      text: where the tokens come from.
      decoded: reading token by token, through the cache.
      prompts: last logits of prompts of the lengths in `prompt_lengths`, each read at once.
      greedy_equal: tokens of a greedy continuation that agree before the first that does not.
      greedy_tokens: length of that continuation.
      greedy_is_tie: whether the first different token is a tie.
      greedy_text: prompt and continuation as the runtime has them; None without a tokenizer.
      has_tokenizer: whether the runtime has a tokenizer to compare the ids of.
      lines: lines of text that were encoded. Those that spell out a special token, such as "<s>",
        are left out: Hugging Face makes it the token, as is known.
      lines_equal: those with the ids of SentencePiece.
      stop_ids: the ids that end an answer.
      missed_stop_ids: those of them at which the runtime goes on.
      rounding: what rounding the weights alone does to the JAX model, for formats that round.
    """

    runtime: str
    text: str
    tolerance: Tolerance
    decoded: Comparison
    prompts: Comparison
    prompt_lengths: tuple[int, ...]
    greedy_equal: int
    greedy_tokens: int
    greedy_is_tie: bool
    greedy_text: str | None
    has_tokenizer: bool
    lines: int
    lines_equal: int
    stop_ids: tuple[int, ...]
    missed_stop_ids: tuple[int, ...]
    rounding: Comparison | None = None

    @property
    def problems(self) -> list[str]:
        """What is outside of the tolerance, in words; empty if nothing is."""
        found, allowed = [], self.tolerance
        for name, compared in (("token by token", self.decoded), ("prompts", self.prompts)):
            if not compared.mean_kl <= allowed.mean_kl:
                found.append(f"{name}: mean KL {compared.mean_kl:.2e} > {allowed.mean_kl:.0e}")
            if allowed.logits is not None and not compared.logits <= allowed.logits:
                found.append(
                    f"{name}: a logit differs by {compared.logits:.2e} > {allowed.logits:.0e}"
                )
            if allowed.exact and compared.wrong:
                found.append(f"{name}: {compared.wrong} of {compared.positions} argmax differ")
        if allowed.exact and self.greedy_equal < self.greedy_tokens and not self.greedy_is_tie:
            found.append(f"greedy tokens differ from number {self.greedy_equal + 1} on")
        if self.lines_equal < self.lines:
            found.append(f"ids differ in {self.lines - self.lines_equal} of {self.lines} lines")
        if self.missed_stop_ids:
            found.append(f"does not stop at the ids {list(self.missed_stop_ids)}")
        return found


def verify(
    model: ModelBundle,
    runtime: Runtime,
    tolerance: Tolerance,
    *,
    text: str,
    text_name: str,
    unrounded_params: dict | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Verification:
    """Runs both models on the beginning of `text`.

    Args:
      model: its parameters as the file has them: rounded, if the format rounds. Without a tokenizer
        random ids are compared, and no lines.
      unrounded_params: where its parameters are rounded, those that they come from.
      on_progress: called with the share of the work that is done.
    """
    config, params, tokenizer = model.config, model.params, model.tokenizer
    context = min(runtime.context_length, config.max_seq_len)
    tokens = _window(model, text, text_name, context)
    expected_TV = _Reference(config, params).logits(tokens)
    lengths = _prompt_lengths(context)
    steps = len(lengths) + 2

    def compare(expected, got):
        return compare_logits(expected, got, tolerance.logits)

    decoded_to = min(_DECODED, context)
    decoded = compare(expected_TV[:decoded_to], runtime.logits(tokens[:decoded_to]))
    on_progress(1 / steps)
    rows = []
    for number, length in enumerate(lengths, start=2):
        rows.append(runtime.last_logits(tokens[:length]))
        on_progress(number / steps)
    prompts = compare(expected_TV[np.array(lengths) - 1], np.stack(rows))
    near = tolerance.logits or max(decoded.logits, prompts.logits)
    prompt = tokens[: min(_GREEDY_PROMPT, context // 2)]
    count = min(_CONTINUED, context - len(prompt))
    continuation = runtime.greedy(prompt, count)
    equal, is_tie = _compare_greedy(config, params, prompt, continuation, near)
    rounding = None
    if unrounded_params is not None:
        rounding = compare(_Reference(config, unrounded_params).logits(tokens), expected_TV)
    lines = _lines(text, tokenizer) if tokenizer and runtime.has_tokenizer else []
    lines_equal = sum(runtime.encode(line) == tokenizer.encode(line) for line in lines)
    on_progress(1.0)
    return Verification(
        runtime=runtime.name,
        text=text_name if tokenizer else "random ids (the model has no tokenizer)",
        tolerance=tolerance,
        decoded=decoded,
        prompts=prompts,
        prompt_lengths=tuple(lengths),
        has_tokenizer=runtime.has_tokenizer,
        lines=len(lines),
        lines_equal=lines_equal,
        stop_ids=model.stop_ids,
        missed_stop_ids=tuple(i for i in model.stop_ids if not runtime.stops_at(i)),
        rounding=rounding,
        greedy_equal=equal,
        greedy_tokens=count,
        greedy_is_tie=is_tie,
        greedy_text=tokenizer and _decode(tokenizer, [*prompt, *continuation]),
    )


def compare_logits(
    expected_TV: np.ndarray, got_TV: np.ndarray, tie: float | None = None
) -> Comparison:
    """Compares logits row by row; `tie` is how near to the largest a logit ties with it."""
    assert expected_TV.shape == got_TV.shape, (expected_TV.shape, got_TV.shape)
    starts = range(0, len(expected_TV), _ROWS)
    parts = [_compare_rows(expected_TV[i : i + _ROWS], got_TV[i : i + _ROWS]) for i in starts]
    difference_T, kl_T, same_T, behind_T = map(np.concatenate, zip(*parts, strict=True))
    difference = float(difference_T.max())
    # Two logits may each be off by as much.
    near = 2 * (difference if tie is None else tie)
    return Comparison(
        positions=len(expected_TV),
        logits=difference,
        mean_kl=float(kl_T.mean()),
        argmax=float(same_T.mean()),
        wrong=int((~same_T & ~(behind_T <= near)).sum()),
    )


def _compare_rows(expected_TV: np.ndarray, got_TV: np.ndarray) -> tuple[np.ndarray, ...]:
    """Figures of each row, all `[T]`: the largest difference of a logit, the KL divergence, whether
    the argmax is the same, how far the expected logit of the chosen token is behind the largest.
    """
    expected_TV, got_TV = expected_TV.astype(np.float64), got_TV.astype(np.float64)
    log_p, log_q = _log_softmax(expected_TV), _log_softmax(got_TV)
    chosen_T = got_TV.argmax(-1)
    return (
        np.abs(expected_TV - got_TV).max(-1),
        (np.exp(log_p) * (log_p - log_q)).sum(-1),
        chosen_T == expected_TV.argmax(-1),
        expected_TV.max(-1) - np.take_along_axis(expected_TV, chosen_T[:, None], 1)[:, 0],
    )


class _Reference:
    def __init__(self, config: ModelConfig, params: dict):
        model = MobileLLM(config)
        self._apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
        self._params = params

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return np.asarray(self._apply(self._params, np.array([tokens], np.int32)))


def _compare_greedy(config, params, prompt, got: list[int], near: float) -> tuple[int, bool]:
    """How many tokens agree with JAX's before the first that does not, and whether that is a tie.

    `near` is how far off a logit may be.
    """
    steps = generate_tokens(
        config, params, [prompt], max_tokens=len(got), sampling=Sampling(temperature=0)
    )
    expected = [int(step[0]) for step in steps]
    pairs = enumerate(zip(expected, got, strict=True))
    equal = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
    if equal is None:
        return len(got), False
    last_V = _Reference(config, params).logits([*prompt, *expected[:equal]])[-1]
    return equal, bool(last_V[expected[equal]] - last_V[got[equal]] <= 2 * near)


def _window(model: ModelBundle, text: str, text_name: str, context: int) -> list[int]:
    """`context` ids to compare on."""
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.config.vocab_size, context).tolist()
    ids = model.tokenizer.encode(text[: 32 * context], bos=model.bos_id is not None)
    if len(ids) < context:
        raise UserError(
            f"{text_name}: has {len(ids)} tokens, the comparison wants the context of {context}; "
            "name a longer --text"
        )
    return ids[:context]


def _prompt_lengths(context: int) -> list[int]:
    """1 to context - 1, which leaves room for a token: all if few, else around powers of two."""
    if context <= 64:
        return list(range(1, context))
    powers = [2**i for i in range(1, int(math.log2(context)) + 1)]
    around = {length for power in powers for length in (power - 1, power, power + 1)}
    return sorted({n for n in around if n < context} | {context - 1})


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


def _lines(text: str, tokenizer: Tokenizer) -> list[str]:
    """The first lines whose ids can be compared: none with a special token spelled out."""
    special = special_pieces(tokenizer)
    lines = (line for line in text.splitlines() if line.strip())
    plain = (line for line in lines if not any(piece in line for piece in special))
    return list(itertools.islice(plain, _LINES))


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
