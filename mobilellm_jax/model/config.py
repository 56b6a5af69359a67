"""`ModelConfig`: everything that defines a model's function.

The config is saved with every checkpoint and read from there by everything downstream. How the same
function is computed (dtype, remat, kernels, unrolling) is not in here: see
`mobilellm_jax.model.execution.Execution`.

Letters used in the whole repository: B batch, T query positions, S key positions, D embed, N query
heads, K key/value heads, G = N / K, H head_dim, F ffn, V vocabulary, L stored blocks, R repeats.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.visits import Sweep, Visit, list_sweeps, list_visits

FFN_KINDS = ("swiglu", "relu")
SHARING_ORDERS = ("none", "immediate", "repeat_all", "reverse")
SHARED_KV_KINDS = ("own", "first_visit")


def default_ffn_dim(embed_dim: int) -> int:
    """Width of the feed-forward layer: 8/3 of `embed_dim`, rounded up to a multiple of 256.

    The rule of every released size and of all ablation models of the paper (sections 2.2 and 3).
    """
    return math.ceil(8 * embed_dim / 3 / 256) * 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the MobileLLM family (arXiv 2402.14905).

    Attributes:
      num_layers: L, blocks whose weights are stored.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; divides `num_heads` (K = N is multi-head attention).
      embed_dim: D, width of the residual stream.
      ffn_dim: F, width of the feed-forward layer; 0 takes `default_ffn_dim(embed_dim)`.
      head_dim: H, width of one head; even (rotary embedding turns pairs). 0 takes
        `embed_dim / num_heads`, as in all released sizes.
      vocab_size: V.
      max_seq_len: longest context in tokens that the model is meant for.
      ffn: "swiglu" or "relu" (FC-ReLU-FC, the paper's baseline).
      tie_embeddings: whether the output head is the transposed input embedding.
      sharing: order in which the stored blocks 1..L are visited (paper, figure 6):
        "none" 1 2 .. L; "immediate" 1 1 2 2 ..; "repeat_all" 1..L 1..L;
        "reverse" 1..L L..1, turning at each further repeat.
      num_repeats: R, visits of each block; 1 exactly when `sharing` is "none".
      shared_kv: what a repeated visit attends to: "own" (each visit projects its own keys and
        values: the paper) or "first_visit" (those of the block's first visit: the official
        code's default forward pass).
      rope_theta: base of the rotary position embedding.
      norm_eps: epsilon of RMSNorm.
      init_std: standard deviation of the normal initialiser of every matrix.

    Raises:
      UserError: a value that does not make a model, with the field, the value and the mend.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    ffn_dim: int = 0
    head_dim: int = 64
    vocab_size: int = 32_000
    max_seq_len: int = 2048
    ffn: str = "swiglu"
    tie_embeddings: bool = True
    sharing: str = "none"
    num_repeats: int = 1
    shared_kv: str = "own"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        _check_types(self)
        if self.ffn_dim == 0:
            object.__setattr__(self, "ffn_dim", default_ffn_dim(self.embed_dim))
        if self.head_dim == 0 and min(self.num_heads, self.embed_dim) > 0:
            if self.embed_dim % self.num_heads:
                raise UserError(
                    f"model.head_dim = 0 takes model.embed_dim / model.num_heads, but "
                    f"{self.embed_dim} is not a multiple of {self.num_heads}: change one of them, "
                    "or set model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        _check_positive(self)
        for name, choices in (
            ("ffn", FFN_KINDS),
            ("sharing", SHARING_ORDERS),
            ("shared_kv", SHARED_KV_KINDS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"model.{name} = {value!r}: use one of {', '.join(choices)}")
        if self.num_heads % self.num_kv_heads:
            divisors = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
            raise UserError(
                f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = "
                f"{self.num_heads}: use one of {divisors}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.head_dim = {self.head_dim} is odd: rotary embedding needs an even width"
            )
        if (self.sharing == "none") != (self.num_repeats == 1):
            raise UserError(
                f"model.sharing = {self.sharing!r} with model.num_repeats = {self.num_repeats}: "
                "use sharing 'none' with 1 repeat, any other order with 2 or more"
            )
        if self.sharing == "none" and self.shared_kv != "own":
            raise UserError(
                f"model.shared_kv = {self.shared_kv!r} needs layer sharing: use 'own', or set "
                "model.sharing and model.num_repeats"
            )

    @property
    def depth(self) -> int:
        """Blocks executed in one forward pass: L * R."""
        return self.num_layers * self.num_repeats

    @functools.cached_property
    def sweeps(self) -> tuple[Sweep, ...]:
        """The passes over all stored blocks."""
        return list_sweeps(self.sharing, self.num_repeats)

    @functools.cached_property
    def visits(self) -> tuple[Visit, ...]:
        """The executions of stored blocks, in order."""
        return list_visits(self.num_layers, self.sweeps, self.shared_kv)

    @property
    def visit_order(self) -> tuple[int, ...]:
        """The stored block (0-based) run at each of the `depth` steps (paper, figure 6)."""
        return tuple(visit.block for visit in self.visits)

    @property
    def num_cache_slots(self) -> int:
        """Visits whose keys and values a decoder must keep: all, or the first of each block."""
        return sum(visit.projects_kv for visit in self.visits)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Builds a config from `values`; raises UserError for unknown or missing keys."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
                raise UserError(f"unknown model config key {key!r}{hint}")
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise UserError(f"model config lacks {', '.join(missing)}")
        return cls(**values)


def _check_types(config: ModelConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is float and type(value) is int:
            object.__setattr__(config, field.name, float(value))
        elif type(value) is not field.type:
            raise UserError(
                f"model.{field.name} = {value!r} is of type {type(value).__name__}: "
                f"use a value of type {field.type.__name__}"
            )


def _check_positive(config: ModelConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in (int, float) and not (0 < value < math.inf):
            raise UserError(f"model.{field.name} = {value}: use a positive number")


def check_expressible(
    config: ModelConfig, fields: Collection[str], where: str, alternative: str
) -> None:
    """Raises UserError for a property that a format does not know, unless it has its default.

    A property that is new here is refused by every format until the format names it.

    Args:
      fields: that the format can give any value.
      where: the format, for the message: "cannot be expressed by ...".
      alternative: what to do instead, for the message.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in fields and value != field.default:
            raise UserError(
                f"model.{field.name} = {value!r} cannot be expressed by {where}; {alternative}, or "
                f"train with model.{field.name} {field.default!r}"
            )
