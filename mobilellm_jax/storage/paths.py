"""Paths as users give them: of this machine's file systems, never URLs of object stores."""

import argparse
import errno
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mobilellm_jax.errors import UserError

# Two letters or more, because C:/ is a drive; one slash, because Path("gs://a") is gs:/a.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_FIXES = {
    "hf": "`prepare` reads a dataset of the Hugging Face Hub as hf:NAME; download anything else",
    "http": "download it first",
    "https": "download it first",
}


def local_path(path: str | os.PathLike) -> Path:
    """The path, unless it is one of which `Path` makes another place than the user meant.

    A URL such as gs://BUCKET/NAME and ~/NAME would become folders "gs:" and "~", and an empty text
    the current folder. Every function that users call with a path begins with it.

    Raises:
      UserError: a URL, whatever its scheme; ~; an empty text; a name that no file can have.
    """
    text = os.fspath(path)
    if not (match := _SCHEME.match(text)):
        return Path(_checked(text))
    if (scheme := match[1].lower()) == "file":
        raise UserError(f"{text}: use the plain path, {unquote(urlsplit(text).path)}")
    fix = _FIXES.get(scheme, "use a local one, and copy it from or to there by yourself")
    raise UserError(
        f"{text}: only local files and folders are supported, not {scheme}://; {fix} (a local "
        f"folder of that name is ./{match[1]}:/)"
    )


def _checked(text: str) -> str:
    if not text:
        raise UserError(
            "the path is empty: name a file or folder (. is the current one; a variable of the "
            "shell may not be set)"
        )
    if text == "~" or text.startswith("~/"):
        raise UserError(
            f"{text}: only shells replace ~, and only where a word begins with it; write "
            f"{os.path.expanduser(text)} (a local folder of that name is ./~)"
        )
    try:
        os.lstat(text)
    except ValueError as error:
        raise UserError(f"{text!r:.200}: no path has the character \\0 in it") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(
                f"{text:.200}...: the name is too long; choose a shorter one"
            ) from error
    return text


def is_utf8(text: str) -> bool:
    """Whether a name or text of the command line has no bytes that are not UTF-8."""
    return text.encode(errors="replace").decode() == text


def path_flag(value: str) -> str:
    """`type` of every flag that takes a path: shows `local_path`'s error with the flag's name."""
    try:
        local_path(value)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value
