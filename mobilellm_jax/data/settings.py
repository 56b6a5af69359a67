"""The settings of `prepare`, checked."""

import dataclasses

from mobilellm_jax.errors import UserError


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
        if self.sequence_length < 2:
            raise UserError(f"--sequence_length {self.sequence_length} is too short; 2048 is usual")
        if not 0 <= self.valid_fraction < 1:
            raise UserError(
                f"--valid_fraction {self.valid_fraction} must be at least 0 and less than 1"
            )
        if self.skip_bad < 0:
            raise UserError(f"--skip_bad {self.skip_bad} is a number of rows, at least 0")
        if self.keep_test and self.split_field is None:
            raise UserError("--keep_test is of rows that say their split; add --split_field FIELD")
        if self.document_separator == "":
            raise UserError("--document_separator is empty; name the text between two documents")
        ways = (self.num_valid_inputs > 0, self.split_field is not None, self.valid_fraction > 0)
        if sum(ways) > 1:
            raise UserError("use only one of --valid_input, --split_field and --valid_fraction")
