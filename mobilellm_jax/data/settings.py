"""The settings of `prepare`, checked."""

import dataclasses

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.paths import is_utf8

MAX_SEQUENCE_LENGTH = 1 << 20
# SentencePiece needs 256 bytes, 3 marks and a character; its largest released models are far below.
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 260, 1 << 20
MAX_WORKERS = 1024


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Settings that decide the content of a dataset, besides the bytes of its inputs.

    Raises UserError for settings that cannot be.
    """

    sequence_length: int
    tokenizer_sha256: str | None
    vocab_size: int | None
    field: str
    split_field: str | None
    valid_fraction: float
    num_valid_inputs: int
    bos: bool
    eos: bool
    records_per_shard: int | None
    document_separator: str | None
    keep_test: bool | None  # None without a split_field
    skip_bad: int

    def __post_init__(self):
        if (self.tokenizer_sha256 is None) == (self.vocab_size is None):
            raise UserError("pass either --tokenizer FILE or --vocab_size N, which trains one")
        check_range("sequence_length", self.sequence_length, 2, MAX_SEQUENCE_LENGTH)
        if self.vocab_size is not None:
            check_range("vocab_size", self.vocab_size, MIN_VOCAB_SIZE, MAX_VOCAB_SIZE)
        if self.records_per_shard is not None:
            check_range("records_per_shard", self.records_per_shard, 1)
        check_range("skip_bad", self.skip_bad, 0)
        if not 0 <= self.valid_fraction < 1:
            raise UserError(
                f"--valid_fraction {self.valid_fraction} must be at least 0 and less than 1"
            )
        if self.keep_test and self.split_field is None:
            raise UserError("--keep_test is for rows that say their split; add --split_field FIELD")
        if self.document_separator == "":
            raise UserError("--document_separator is empty; name the text between two documents")
        if not is_utf8(self.document_separator or ""):
            raise UserError(
                f"--document_separator {self.document_separator!a} is not UTF-8; name another text"
            )
        ways = (self.num_valid_inputs > 0, self.split_field is not None, self.valid_fraction > 0)
        if sum(ways) > 1:
            raise UserError("use only one of --valid_input, --split_field and --valid_fraction")


def check_range(flag: str, value: int, low: int, high: int | None = None) -> None:
    """Raises UserError for a flag's value that is no integer from ``low`` to ``high``."""
    if not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"at least {low:,}" if high is None else f"a number from {low:,} to {high:,}"
        raise UserError(f"--{flag} {value} is not possible; use {bounds}")
