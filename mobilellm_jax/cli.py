"""The command line: verbs, their flags, and how errors are shown.

Each verb's module is imported only when the verb runs, so that `--help` answers at once.
"""

import argparse
import errno
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

import mobilellm_jax
from mobilellm_jax import interrupts
from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.large_pages import run_with_large_pages
from mobilellm_jax.storage.paths import is_utf8

# Verb -> (module with `add_arguments(parser)` and `main(args)`, one line of help).
VERBS = {
    "prepare": ("mobilellm_jax.data.command", "turn text into a dataset of packed tokens"),
    "plan": ("mobilellm_jax.planning.command", "ask what training takes on hardware not here"),
    "doctor": ("mobilellm_jax.training.doctor", "check a run before its first step"),
    "train": ("mobilellm_jax.training.command", "train a model, or go on with its training"),
    "evaluate": ("mobilellm_jax.evaluation.command", "measure loss, perplexity, bits per byte"),
    "generate": ("mobilellm_jax.inference.command", "continue prompts with a trained model"),
    "convert": ("mobilellm_jax.export.command", "write a model for another runtime, read one"),
}

_VERBS_WITH_CONFIG = ("plan", "doctor", "train", "convert")

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

_EPILOG = """\
From text to a model, in this order (`mobilellm VERB --help` has an example for each):
  mobilellm prepare  --input book.txt --vocab_size 2048 --sequence_length 256 \\
      --valid_fraction 0.05 --output data/book
  mobilellm plan     --config configs/125m.py:h100-8 --topology h100-8
  mobilellm doctor   --config configs/quickstart.py --workdir runs/book \\
      --config.data.path=data/book
  mobilellm train    --config configs/quickstart.py --workdir runs/book \\
      --config.data.path=data/book
  mobilellm evaluate --checkpoint runs/book --data data/book
  mobilellm generate --checkpoint runs/book --prompt "Once upon a time"
  mobilellm convert  --to pte --checkpoint runs/book --output book_pte
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: the verb and its flags; None takes those of the process, and its signals.

    Returns:
      The exit status: 0, 2 for a mistake that the user can fix, 130 after Ctrl-C and 143 after
      SIGTERM, 141 where nobody reads what is printed any more, as after `| head` (128 and the
      signal, as shells count).
    """
    if argv is None:
        interrupts.take_over()  # done already by `__main__`
        if sys.stdout is not None:  # it may have been closed
            sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    args, rest = _parser(verb).parse_known_args(arguments)
    is_override = re.compile(r"--config\.[\w.]+=").match
    if rest and not (verb in _VERBS_WITH_CONFIG and all(map(is_override, rest))):
        _parser(verb).parse_args(arguments)  # names what it does not know, and exits
    if argv is None and verb == "train":
        run_with_large_pages()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    module = importlib.import_module(VERBS[verb][0])
    if verb in _VERBS_WITH_CONFIG:
        args.overrides = rest
        args.model_of_run = _model_of_run
    status = 0
    try:
        with interrupts.working():
            module.main(args)
            print(end="", flush=True)  # or it would be noticed after this that nobody reads
    except BaseException:
        if interrupts.answered() is None:  # else it is what became of the signal's exception
            status = _status_of_error(arguments)
    interrupts.leave()
    return status


def _status_of_error(arguments: Sequence[str]) -> int:
    """Shows the error that is being handled, if it is one for users; raises it again if not."""
    try:
        raise
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (UnicodeEncodeError, TypeError):  # TypeError: of libraries in C++
        if not (bad := [a for a in arguments if not is_utf8(a)]):
            raise
        names = " or ".join(f"{a!a:.200}" for a in bad)
        print(f"error: {names}, which is not UTF-8, cannot be used here; rename", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _model_of_run(path: str, overrides: Sequence[str]):
    """The `ModelConfig` of a config file, for verbs whose rooms do not know training."""
    from mobilellm_jax.training.run_config import load_config, model_config

    return model_config(load_config(path, overrides))


def _nobody_reads() -> bool:
    """Whether it was stdout's pipe that broke. What is left to print then goes nowhere."""
    try:
        print(flush=True)  # nothing but another try tells; a traceback may follow an empty line
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mobilellm",
        description="Small on-device language models: prepare, train, measure, convert.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=mobilellm_jax.__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, (module, summary) in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == verb:
            importlib.import_module(module).add_arguments(sub)
    return parser
