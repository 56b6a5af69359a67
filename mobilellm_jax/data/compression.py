"""Reading compressed files as a stream of bytes, with truncation noticed in every format."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.untrusted import refuse_lfs_pointer

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_RAW_BYTES = 1 << 16


def decompressed(path: str, compression: str, note: Callable[[bytes], None]) -> Iterator[bytes]:
    """Decompressed chunks of a file of one or more streams; ``note`` sees the raw chunks.

    Raises UserError for a file that is damaged or ends in the middle (zstandard's own stream
    reader takes a truncated file for a complete one).
    """
    decoder, fresh = _decoder(path, compression), True
    with open(path, "rb") as file:
        refuse_lfs_pointer(path, file.read(100))
        file.seek(0)
        while raw := file.read(_RAW_BYTES):
            note(raw)
            while raw:
                if decoder is None:
                    yield raw
                    break
                try:
                    data = decoder.decompress(raw)
                except Exception as error:  # each library raises its own kind
                    raise UserError(
                        f"{path}: damaged, or not a {compression} file, before byte {file.tell()} "
                        f"({error}); fetch it again"
                    ) from error
                fresh, raw = False, b""
                if decoder.eof:
                    raw = decoder.unused_data.lstrip(b"\0")  # streams may be padded
                    decoder, fresh = _decoder(path, compression), True
                if data:
                    yield data
    if not fresh:
        raise UserError(
            f"{path}: the {compression} file ends in the middle; it is truncated: fetch it again"
        )


def _decoder(path: str, compression: str) -> Any:
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    if compression == ".bz2":
        return bz2.BZ2Decompressor()
    if compression == ".xz":
        return lzma.LZMADecompressor()
    if compression == ".zst":
        try:
            import zstandard  # optional dependency
        except ImportError as error:
            raise UserError(
                f"{path}: reading .zst files needs a library; run: pip install zstandard"
            ) from error
        return zstandard.ZstdDecompressor().decompressobj()
    return None
