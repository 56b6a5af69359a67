"""Generation: prefill the prompts at once, then decode one token of every row at a time."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.sampling import NO_NUMBERS, Sampling, sample
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.decoding import DecodeWeights, decode, decode_weights, make_cache
from mobilellm_jax.model.execution import Execution, execution_for
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.tokenizers.tokenizer import Tokenizer, check_vocabulary

# Prompt and cache lengths are rounded up to multiples of this: one compilation serves many.
_LENGTH_BUCKET = 64


def generate_tokens(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    execution: Execution | None = None,
    weights: DecodeWeights | None = None,
) -> Iterator[np.ndarray]:
    """Continues each prompt; yields the next token of every row as soon as it is known.

    Row i gives the same tokens whatever the other prompts are; only the room that the longest one
    leaves in the context limits them all. Generation ends when every row has stopped, after
    `max_tokens` tokens, or when the longest row fills the context of the model.

    Args:
      prompts: token ids of B prompts, of any lengths from 1 on.
      stop_ids: tokens that end a row; the stopping token itself is yielded.
      weights: the `decode_weights` of the parameters, for whoever generates again and again; None
        makes them here, which takes the time of about five tokens.

    Yields:
      int32 `[B]`; -1 for rows that have stopped.

    Raises:
      UserError: an empty prompt, ids outside the vocabulary, a prompt that leaves no room in the
        context, `max_tokens` below 1, or logits that are NaN or infinite.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens}: use 1 or more")
    lengths = _check_prompts(config, prompts)
    room = config.max_seq_len - max(lengths)
    if room < max_tokens:
        logging.warning(
            "the longest prompt leaves room for %d tokens in the context of %d: generating no more",
            room,
            config.max_seq_len,
        )
        max_tokens = room
    model = MobileLLM(config, execution or _execution(config, lengths))
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(len(prompts))
    )
    steps = _steps(model, params, weights, prompts, row_keys, max_tokens, sampling)
    running = np.ones(len(prompts), bool)
    for next_B in _one_ahead(steps):
        chosen = np.asarray(next_B)
        if (chosen[running] == NO_NUMBERS).any():
            raise UserError(_why_no_numbers(params, model.execution.dtype))
        yield np.where(running, chosen, -1)
        running &= ~np.isin(chosen, list(stop_ids))
        if not running.any():
            return


def _steps(model, params, weights, prompts, row_keys, max_tokens, sampling):
    """Starts the computation of one token of every row after the other, waiting for none."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), _round_up(max(lengths))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths_B = jnp.array(lengths, jnp.int32)
    hidden, prompt_kv = _prefill(model, params, tokens, lengths_B)
    next_B = _first_token(model, params, hidden, row_keys, sampling)
    yield next_B
    if max_tokens == 1:
        return
    capacity = _round_up(max(lengths) + max_tokens)
    cache = make_cache(model.config, prompt_kv, lengths_B, capacity)
    del prompt_kv
    weights = weights or decode_weights(params, model.execution.dtype, num_rows=len(prompts))
    for number in range(1, max_tokens):
        next_B, cache = _decode_token(model, weights, cache, next_B, row_keys, number, sampling)
        yield next_B


def _one_ahead(steps: Iterator[jax.Array]) -> Iterator[jax.Array]:
    """From the second on, the next step starts before the host waits for the present one.

    The first token waits for nothing else: not for the weights to be laid out for decoding, nor for
    the compilation of the step.
    """
    yield next(steps)
    present = next(steps, None)
    while present is not None:
        following = next(steps, None)
        yield present
        present = following


def generate(
    model: ModelBundle,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    on_text: Callable[[int, str], None] = lambda row, text: None,
) -> list[str]:
    """Continues texts; returns the continuations, without the prompts.

    Args:
      model: one with a tokenizer.
      on_text: called with (row, new piece of text) as the text comes.

    Raises:
      UserError: see `generate_tokens`; or a tokenizer with more ids than the model.
    """
    ids = encode_prompts(model, prompts)
    rows = [_RowText(model.tokenizer, prompt_ids) for prompt_ids in ids]
    stop_ids = frozenset(model.stop_ids)
    for tokens in generate_tokens(
        model.config,
        model.params,
        ids,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
    ):
        for row, token in enumerate(tokens.tolist()):
            if token != -1 and token not in stop_ids and (piece := rows[row].add(token)):
                on_text(row, piece)
    for row, text in enumerate(rows):
        if piece := text.finish():
            on_text(row, piece)
    return [row.text for row in rows]


def encode_prompts(model: ModelBundle, prompts: Sequence[str]) -> list[list[int]]:
    """The token ids of each prompt, BOS first if the model has one.

    Raises:
      UserError: prompts that `generate_tokens` refuses; a tokenizer with more ids than the model.
    """
    check_vocabulary(model.tokenizer, model.config.vocab_size, "the tokenizer")
    ids = [model.tokenizer.encode(prompt, bos=model.bos_id is not None) for prompt in prompts]
    _check_prompts(model.config, ids)
    return ids


class _RowText:
    """Text of a growing row of tokens, cut only where characters are complete."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._prompt_length = len(tokenizer.decode(prompt_ids))
        self.text = ""

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._decoded()
        # A replacement character at the end may be the first bytes of one that is still coming.
        return "" if text.endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        return self._take(self._decoded())

    def _decoded(self) -> str:
        known = [i for i in self._ids if i < self._tokenizer.vocab_size]
        return self._tokenizer.decode(known)[self._prompt_length :]

    def _take(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new


def _check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> list[int]:
    if not prompts:
        raise UserError("no prompt")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row + 1} is empty: give at least one token (BOS counts)")
        if len(prompt) >= config.max_seq_len:
            raise UserError(
                f"prompt {row + 1} has {len(prompt)} tokens, the context of the model holds "
                f"{config.max_seq_len}: shorten it to {config.max_seq_len - 1} or fewer"
            )
        if bad := [i for i in prompt if not 0 <= i < config.vocab_size]:
            raise UserError(
                f"prompt {row + 1} has token id {bad[0]}, the vocabulary has {config.vocab_size}"
            )
    return [len(prompt) for prompt in prompts]


def _why_no_numbers(params: dict, dtype: str) -> str:
    bad = [
        name
        for name, value in flatten_dict(params, sep="/").items()
        if not jnp.isfinite(value).all()
    ]
    if bad:
        return f"the model's weights {', '.join(bad)} hold NaN or Inf: take an earlier checkpoint"
    return (
        f"the model's logits are NaN or infinite: its weights are finite, but too large for {dtype}"
        "; take an earlier checkpoint"
    )


def _execution(config: ModelConfig, prompt_lengths: list[int]) -> Execution:
    """fp32, with the kernel of this device for the prompts."""
    num_tokens = _round_up(max(prompt_lengths))
    return execution_for(jax.local_devices()[0], config, num_tokens, dtype="float32")


def _round_up(length: int) -> int:
    return -(-length // _LENGTH_BUCKET) * _LENGTH_BUCKET


@functools.partial(jax.jit, static_argnames="model")
def _prefill(model: MobileLLM, params, tokens_BT, lengths_B):
    """Hidden state `[B, D]` of each prompt's last token, and all keys and values."""
    hidden_BTD, prompt_kv = model.apply({"params": params}, tokens_BT, method="prefill")
    last_B11 = (lengths_B - 1)[:, None, None]
    return jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0], prompt_kv


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def _first_token(model: MobileLLM, params, hidden_BD, row_keys_B, sampling: Sampling):
    return _sample_from(model, params, hidden_BD, row_keys_B, 0, sampling)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache")
def _decode_token(model, weights, cache, tokens_B, row_keys_B, number, sampling: Sampling):
    hidden_BTD, cache = decode(model.config, weights, tokens_B[:, None], cache)
    tokens_B = _sample_from(
        model, weights.vocabulary, hidden_BTD[:, 0], row_keys_B, number, sampling
    )
    return tokens_B, cache


def _sample_from(model, params, hidden_BD, row_keys_B, number, sampling: Sampling):
    logits_BV = model.apply({"params": params}, hidden_BD, method="logits")
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, number)
    return sample(logits_BV, keys_B, sampling)
