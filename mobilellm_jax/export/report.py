"""What a conversion wrote, how far it is from the JAX model, and what it took: JSON and a table."""

import dataclasses
import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import mobilellm_jax
from mobilellm_jax.export.formats import FORMATS
from mobilellm_jax.export.verification import Comparison, Verification
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.costs import count_params
from mobilellm_jax.storage.exports import OWN_KEY, REPORT
from mobilellm_jax.storage.untrusted import encode_json
from mobilellm_jax.tables import table

_PACKAGES = (
    *("jax", "torch", "transformers", "executorch", "torchao", "gguf", "llama-cpp-python"),
    *("litert-torch", "litert-lm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All there is to say of one conversion.

    Attributes:
      source: what was converted, as the user named it.
      file_bytes: of each file written.
      write_seconds: reading the model not counted.
      verify_seconds: 0 without verification.
      peak_bytes: resident memory up to the end of writing, model included, of this process or of
        the largest that it started.
      verification: None if it was switched off.
    """

    format: str
    dtype: str
    source: str
    config: ModelConfig
    context_length: int
    file_bytes: dict[str, int]
    write_seconds: float
    verify_seconds: float
    peak_bytes: int
    verification: Verification | None
    metadata: dict[str, Any]

    def write(self, folder: Path) -> None:
        """`report.json` and `report.md`."""
        (folder / REPORT).write_bytes(encode_json(self.to_dict()))
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        v = self.verification
        return {
            OWN_KEY: {"version": mobilellm_jax.__version__, "config": self.config.to_dict()},
            "format": self.format,
            "dtype": self.dtype,
            "source": self.source,
            "training": self.metadata,
            "parameters": count_params(self.config),
            "context_length": self.context_length,
            "file_bytes": self.file_bytes,
            "write_seconds": round(self.write_seconds, 1),
            "verify_seconds": round(self.verify_seconds, 1),
            "peak_bytes": self.peak_bytes,
            "verified": v is not None,
            "verification": v and {**dataclasses.asdict(v), "problems": v.problems},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "packages": _versions(),
        }

    def to_markdown(self) -> str:
        c = self.config
        rows = [
            ("written from", self.source),
            ("model", describe(c)),
            ("weights", self.dtype),
            ("context", f"{self.context_length} tokens"),
            *(("file", f"{name}, {megabytes(size)}") for name, size in self.file_bytes.items()),
            ("time", f"{self.write_seconds:.0f} s writing, {self.verify_seconds:.0f} s verifying"),
            ("peak memory", megabytes(self.peak_bytes)),
        ]
        parts = [f"# {FORMATS[self.format].title}", table(("", ""), rows)]
        if self.verification is None:
            parts.append("**Not verified**: converted with --no-verify.")
        else:
            parts += ["## Against the JAX model", verification_table(self.verification)]
            if self.verification.greedy_text:
                quoted = self.verification.greedy_text.replace("\n", "\n> ")
                parts.append(f"What it continues the text with, greedily:\n\n> {quoted}")
        return "\n\n".join(parts) + "\n"


def verification_table(v: Verification) -> str:
    """The figures as a Markdown table."""
    first, last = v.prompt_lengths[0], v.prompt_lengths[-1]
    compared = [
        (f"read one at a time, {v.decoded.positions} tokens", v.decoded),
        (f"{v.prompts.positions} prompts of {first} to {last} tokens", v.prompts),
    ]
    if v.rounding:
        compared.append(("rounding of the weights alone, in JAX", v.rounding))
    rows = [
        (
            name,
            f"{x.logits:.1e}",
            f"{x.mean_kl:.1e}",
            f"{x.argmax:.2%}{_ties(x, v)}",
        )
        for name, x in compared
    ]
    header = ("", "largest logit difference", "mean KL, nats", "same argmax")
    tie = ", then a tie" if v.greedy_is_tie else ""
    t = v.tolerance
    bounds = [f"mean KL {t.mean_kl:.0e}"]
    bounds += [f"logits {t.logits:.0e}"] if t.logits is not None else []
    bounds += ["the same argmax and greedy tokens, but for ties"] if t.exact else []
    ids = f"the ids of SentencePiece in {v.lines_equal} of {v.lines} lines"
    if not v.has_tokenizer:
        ids = "none that the runtime reads, so no ids were compared"
    lines = [
        f"- Runtime: {v.runtime}. Text: {v.text}.",
        f"- Greedy: {v.greedy_equal} of {v.greedy_tokens} tokens the same{tie}.",
        f"- Tokenizer: {ids}.",
        f"- Stops at: {', '.join(map(str, v.stop_ids)) or 'no id'}.",
        f"- Asked for: {', '.join(bounds)}.",
    ]
    return table(header, rows) + "\n\n" + "\n".join(lines)


def describe(config: ModelConfig) -> str:
    text = f"{count_params(config):,} parameters, {config.num_layers} blocks"
    if config.num_repeats > 1:
        text += f", each run {config.num_repeats} times ({config.sharing}, {config.shared_kv})"
    return text + (", tied embeddings" if config.tie_embeddings else ", untied head")


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _ties(compared: Comparison, v: Verification) -> str:
    if not v.tolerance.exact:
        return ""
    different = round((1 - compared.argmax) * compared.positions)
    ties = different - compared.wrong
    return f" ({ties} of {different} others are ties)" if ties else ""


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
