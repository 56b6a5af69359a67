"""A prepared dataset's folder, opened once: header, tokenizer, splits."""

import dataclasses
from pathlib import Path

from mobilellm_jax.data.records import HEADER_FILE, DatasetHeader
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.paths import is_utf8, local_path
from mobilellm_jax.tokenizers.files import TOKENIZER_FILES, read_tokenizer
from mobilellm_jax.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset that `mobilellm prepare` made.

    Attributes:
      directory: its folder, as it was named.
      header: all facts about it.
      tokenizer: the one that it was made with.
    """

    directory: str
    header: DatasetHeader
    tokenizer: Tokenizer

    @classmethod
    def open(cls, directory: str | Path) -> "Dataset":
        """Reads header and tokenizer.

        Raises:
          UserError: as for `DatasetHeader.load`; or the tokenizer is not the dataset's, or the name
        is one that its records cannot be read by.
        """
        header = DatasetHeader.load(directory)
        if not is_utf8(str(directory)):
            raise UserError(f"{str(directory)!a} is not UTF-8, as ArrayRecord needs it; rename it")
        return cls(str(directory), header, _matching_tokenizer(local_path(directory), header))


def _matching_tokenizer(directory: Path, header: DatasetHeader) -> Tokenizer:
    tokenizer = read_tokenizer(directory)
    if tokenizer is None:
        raise UserError(
            f"{directory}: {' or '.join(TOKENIZER_FILES)} is missing; put it back, or prepare the "
            "dataset again"
        )
    if tokenizer.sha256 != header.tokenizer_sha256:
        raise UserError(
            f"{directory}: the tokenizer in it has sha256 {tokenizer.sha256[:12]}..., but the "
            f"dataset was made with {header.tokenizer_sha256[:12]}...; put the right tokenizer back"
        )
    if tokenizer.vocab_size != header.vocab_size:
        raise UserError(
            f"{directory / HEADER_FILE}: vocab_size {header.vocab_size}, but the tokenizer has "
            f"{tokenizer.vocab_size}; prepare the dataset again"
        )
    return tokenizer
