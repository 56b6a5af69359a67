"""Loss, perplexity and bits per byte, on a prepared split and by the official protocol."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from mobilellm_jax.data.compression import COMPRESSIONS, decompressed
from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import RecordSource, eval_batches
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.execution import Execution
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.objectives.next_token import EvalSums, make_eval_step, predicts_across_documents
from mobilellm_jax.storage.paths import local_path


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A measured loss; where a record has a loss mask, that of the targets which it has.

    Attributes:
      loss: mean negative log-likelihood in nats per predicted token, as in training: control tokens
        (BOS, EOS, ...) are among them.
      num_tokens: predicted tokens.
      text_loss: the same without control tokens, which stand for no text.
      num_text_tokens: predicted tokens without control tokens.
      bits_per_byte: bits of the text per UTF-8 byte of it: comparable between tokenizers.
    """

    loss: float
    num_tokens: int
    text_loss: float
    num_text_tokens: int
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)

    @property
    def text_perplexity(self) -> float:
        """exp(text_loss)."""
        return _exp(self.text_loss)

    def figures(self) -> dict[str, float]:
        """All of them by name."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "num_tokens": self.num_tokens,
            "text_loss": self.text_loss,
            "text_perplexity": self.text_perplexity,
            "num_text_tokens": self.num_text_tokens,
            "bits_per_byte": self.bits_per_byte,
        }

    def metrics(self) -> dict[str, float]:
        """Those that the training log has, under its names."""
        return {f"eval/{k}": v for k, v in self.figures().items() if not k.startswith("num_")}


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def split_perplexity(
    eval_step: Callable, params: dict, batches: Iterable[dict], source: RecordSource
) -> Perplexity:
    """Runs `eval_step(params, batch)` over `batches` and sums up.

    Every token of the split but the first is predicted once. The bytes are those of the split's
    text; where only some of its targets count, the bytes that these stand for.

    Args:
      eval_step: from `objectives.next_token.make_eval_step`, jitted.
      batches: device batches of the split.
      source: the split.
    """
    sums = np.zeros(len(EvalSums._fields))
    for batch in batches:
        sums += jax.device_get(eval_step(params, batch))
    total = EvalSums(*sums.tolist())
    split = source.header.splits[source.split]
    counts_all = total.num_tokens == split.num_tokens
    num_bytes = split.num_bytes if counts_all else total.num_bytes
    return Perplexity(
        loss=_ratio(total.loss, total.num_tokens),
        num_tokens=round(total.num_tokens),
        text_loss=_ratio(total.text_loss, total.num_text_tokens),
        num_text_tokens=round(total.num_text_tokens),
        bits_per_byte=_ratio(total.text_loss / math.log(2), num_bytes),
    )


def dataset_perplexity(
    model: ModelBundle,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    max_records: int | None,
    execution: Execution,
) -> Perplexity:
    """Loss on the first `max_records` records (None: all) of a prepared split.

    Raises:
      UserError: no such split, or a dataset that was made with another tokenizer.
    """
    if dataset.tokenizer.sha256 != model.tokenizer.sha256:
        raise UserError(
            f"{dataset.directory} was prepared with another tokenizer than the checkpoint's: "
            "prepare the text again with the tokenizer.model of the checkpoint"
        )
    source = RecordSource(dataset, split)
    num_records = len(source) if max_records is None else min(max_records, len(source))
    batch_size = min(batch_size, num_records)  # more would be padding
    mask_documents = bool(model.provenance.mask_documents)
    batches = eval_batches(
        source,
        batch_size=batch_size,
        max_records=max_records,
        across_documents=predicts_across_documents(
            mask_documents, model.provenance.loss_version or 1
        ),
    )
    eval_step = make_eval_step(model.config, execution, mask_documents=mask_documents)
    shown = tqdm(batches, total=math.ceil(num_records / batch_size), unit="batch")
    return split_perplexity(jax.jit(eval_step), model.params, shown, source)


OFFICIAL_CHUNK = 2048


def protocol(chunk: int, max_chunks: int | None) -> str:
    """How `official_perplexity` measures with these arguments, in words."""
    if chunk == OFFICIAL_CHUNK and max_chunks is None:
        return "official protocol"
    part = "" if max_chunks is None else f"first {max_chunks:,} "
    return f"{part}chunks of {chunk} tokens: not the official protocol (all, of {OFFICIAL_CHUNK})"


def official_text(path: str | Path) -> str:
    """The text of a file, compressed or not, as the official script sees it.

    The script takes the rows of the Hugging Face dataset `wikitext-2-raw-v1`, where a row is a line
    with its line end, or empty for a blank line, and joins them with a blank line.

    Raises:
      UserError: the file is missing, damaged, empty or not UTF-8 text.
    """
    suffix = local_path(path).suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    try:
        raw = b"".join(decompressed(str(path), compression, lambda raw: None))
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise UserError(f"{path}: holds no text")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def official_perplexity(
    model: ModelBundle,
    text: str,
    *,
    execution: Execution,
    chunk: int = OFFICIAL_CHUNK,
    max_chunks: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity under the protocol of the official `eval.py` (facebookresearch/MobileLLM).

    The text is tokenised whole with one BOS in front, cut into chunks of `chunk` tokens of which
    the last partial one is dropped, and each chunk predicts its own tokens but the first; the
    result is the exponential of the mean over chunks of their mean losses. Not comparable with
    sliding-window figures, nor with those of other chunks. `bits_per_byte` takes the predicted
    tokens to have their share of the bytes of the joined text.

    Args:
      chunk: the official one is 2048; longer ones than the training sequences get a warning.
      max_chunks: the first so many alone; None takes all.

    Raises:
      UserError: fewer tokens than one chunk.
    """
    if model.tokenizer.bos_id is None:
        raise UserError("the tokenizer has no BOS, with which the official protocol begins")
    _warn_of_unseen_lengths(model, chunk)
    ids = np.array(model.tokenizer.encode(text, bos=True), np.int32)
    num_chunks = len(ids) // chunk
    if num_chunks == 0:
        raise UserError(
            f"the text has {len(ids)} tokens, a chunk needs at least {chunk}: take a longer text, "
            "or --chunk N, which is not the official protocol"
        )
    num_chunks = min(num_chunks, max_chunks or num_chunks)
    eval_step = jax.jit(make_eval_step(model.config, execution))
    losses, weights = [], jnp.ones((1, chunk - 1), jnp.float32)
    for row in tqdm(
        ids[: num_chunks * chunk].reshape(num_chunks, chunk), unit="chunk", disable=not progress
    ):
        batch = {
            "inputs": jnp.asarray(row[None, :-1]),
            "targets": jnp.asarray(row[None, 1:]),
            "segment_ids": jnp.ones((1, chunk - 1), jnp.int32),
            "loss_weights": weights,
            "text_weights": weights,  # encoding a text makes no control tokens of it
            "target_bytes": jnp.zeros((1, chunk - 1), jnp.int32),  # shared out below
        }
        sums = eval_step(model.params, batch)
        losses.append(float(sums.loss) / float(sums.num_tokens))
    loss = float(np.mean(losses))
    num_predicted = num_chunks * (chunk - 1)
    bits = loss / math.log(2) * len(ids) / len(text.encode())
    return Perplexity(loss, num_predicted, loss, num_predicted, bits)


def _warn_of_unseen_lengths(model: ModelBundle, chunk: int) -> None:
    trained = model.provenance.sequence_length or model.config.max_seq_len
    if chunk - 1 > trained:
        logging.warning(
            "chunks of %d tokens, but the model was trained on sequences of %d and knows no "
            "position beyond: the figure may be poor; --chunk %d stays within them",
            chunk,
            trained,
            trained,
        )
