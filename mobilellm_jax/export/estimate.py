"""What a model takes on a phone, counted from its config: file, memory, and the paper's budget."""

import dataclasses
from collections.abc import Mapping

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.report import megabytes
from mobilellm_jax.huggingface.config import LLAMA_FIELDS
from mobilellm_jax.model.config import ModelConfig, check_expressible
from mobilellm_jax.model.costs import count_block_params, count_params, kv_cache_bytes_per_token
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.tables import table

DRAM_BUDGET = 0.1 * 6e9  # an app's tenth of a phone with 6 GB (paper, section 1)

# Bytes per weight. GGUF's blocks of 32 share an fp16 scale; int8 rows share an fp32 scale.
_GGUF = {"float32": 4.0, "float16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
_COLUMNS = (
    ("pte", "float32"),
    ("gguf", "float16"),
    ("gguf", "q8_0"),
    ("gguf", "q4_0"),
    ("litertlm", "float32"),
    ("litertlm", "int8"),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of a converted model; its tokenizer, half a megabyte, is not counted.

    Attributes:
      file: on disk.
      memory: while it runs: the weights as the runtime holds them, and the cache of a full context.
    """

    file: float
    memory: float

    @property
    def fits(self) -> bool:
        """Whether an app may take it by the paper's rule."""
        return self.memory <= DRAM_BUDGET


def estimate(config: ModelConfig, format: str, dtype: str, context_length: int) -> Cost:
    """The cost in one of the phone formats of `mobilellm_jax.export.formats`.

    pte: the file has the embedding twice, for the lookup and for the head. XNNPACK packs all
    matrices into memory of its own, a shared block once with the weight cache of the phone
    libraries (benchmarks/phone_latency.py); the lookup stays in the file.
    gguf: a shared block is stored once per visit, the tied embedding once, the file is mapped.
    litertlm: everything is stored once; its graph, 0.1 MB for each visit of a block, not counted.
    """
    blocks, embedding = count_block_params(config), config.vocab_size * config.embed_dim
    head = 0 if config.tie_embeddings else embedding
    cache = kv_cache_bytes_per_token(config, 2 if format == "gguf" else 4) * context_length
    if format == "pte":
        file = 4 * (blocks + 2 * embedding)
        return Cost(file, 4 * (blocks + embedding) + cache)
    if format == "gguf":
        size = _GGUF[dtype]
        outer = _GGUF["q8_0"] if dtype == "q4_0" else size
        tables = embedding * outer if config.tie_embeddings else embedding * size + head * outer
        file = blocks * config.num_repeats * size + tables
        return Cost(file, file + cache)
    file = (1 if dtype == "int8" else 4) * (blocks + embedding + head)
    return Cost(file, file + cache)


def _cell(config: ModelConfig, format: str, dtype: str, context_length: int) -> str:
    if format != "pte":
        try:
            check_expressible(config, LLAMA_FIELDS, format, "")
        except UserError:
            return "-"
    cost = estimate(config, format, dtype, context_length)
    return f"{cost.file / 1e6:,.0f} / {cost.memory / 1e6:,.0f}{'' if cost.fits else ' *'}"


def expansion(config: ModelConfig) -> str:
    """What storing shared blocks once per visit costs, in words, for fp32 weights."""
    stored = 4 * count_params(config)
    extra = 4 * count_block_params(config) * (config.num_repeats - 1)
    return (
        f"each is stored {config.num_repeats} times, which in fp32 makes "
        f"{megabytes(stored + extra)} of {megabytes(stored)}"
    )


def estimate_table(context_length: int | None, models: Mapping[str, ModelConfig] = PRESETS) -> str:
    """Returns the table of `mobilellm convert --estimate`: models in every phone format, in MB.

    Args:
      context_length: in tokens, 1 or more; None is the shortest max_seq_len of the models.
      models: by name; "-" stands for a format that cannot express one.

    Raises:
      UserError: another context_length.
    """
    if context_length is None:
        context_length = min(config.max_seq_len for config in models.values())
    if context_length < 1:
        raise UserError(f"--context_length {context_length}: use 1 or more")
    rows = [
        (name, *(_cell(config, *column, context_length) for column in _COLUMNS))
        for name, config in models.items()
    ]
    header = ("MB, file / memory", *(f"{format} {dtype}" for format, dtype in _COLUMNS))
    return (
        f"{table(header, rows)}\n\n"
        "Memory: weights as the runtime holds them, and keys and values of "
        f"{context_length} tokens\n"
        "(fp16 in llama.cpp, fp32 elsewhere); working memory and the app come on top.\n"
        f"* is more than {megabytes(DRAM_BUDGET)}, the paper's budget: a tenth of 6 GB."
    )
