"""`mobilellm convert`: a checkpoint to the format of another runtime, or a folder of others read.

Every conversion ends with the target's own runtime: what was written is loaded and compared with
the JAX model before it gets its name.
"""

import argparse
import contextlib
import dataclasses
import os
import pydoc_data.topics
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.formats import FORMATS, Format, rounded_params
from mobilellm_jax.machine.extras import import_extra
from mobilellm_jax.model.config import SHARED_KV_KINDS, ModelConfig
from mobilellm_jax.storage.exports import new_export
from mobilellm_jax.storage.paths import path_flag

_EPILOG = """\
formats, and the dtypes of their weights (the first is the default):
{formats}

examples:
  mobilellm convert --to pte --checkpoint runs/my_model --output exports/my_model_pte
  mobilellm convert --to gguf --dtype q8_0 --checkpoint my_model_hf --output exports/my_model_q8
  mobilellm convert --from hf --input my_model_hf --output runs/imported
  mobilellm convert --estimate --context_length 1024
  mobilellm convert --estimate --config configs/125m.py --config.model.num_layers=24

The output is a folder with the file for the app, its tokenizer, report.md and report.json with how
far the file is from the JAX model, and checksums. It gets its name when all that is done.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG.format(
        formats="\n".join(
            f"  {name:<11} {', '.join(f.tolerances):<34} {f.title}" for name, f in FORMATS.items()
        )
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=list(FORMATS), help="the format to write")
    what.add_argument("--from", dest="source", choices=["hf"], help="the format to read")
    what.add_argument(
        "--estimate",
        action="store_true",
        help="print what each preset, or the model of --config or --checkpoint, takes in each "
        "format: file, memory, the paper's DRAM budget",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        type=path_flag,
        help="with --to or --estimate: a run's workdir, one of its steps, or a HF folder",
    )
    add("--config", metavar="FILE", type=path_flag, help="with --estimate: a file as in configs/")
    add("--config.KEY=VALUE", dest="_", action="store_true", help="change one value of the config")
    parser.set_defaults(overrides=(), model_of_run=None)  # the command line fills them in
    add("--input", metavar="DIR", type=path_flag, help="with --from: the folder to read")
    add(
        "--output",
        metavar="DIR",
        type=path_flag,
        help="the folder to write; with --from: a new workdir",
    )
    add("--dtype", metavar="DTYPE", help="with --to: of the weights, see below")
    add(
        "--context_length",
        type=int,
        metavar="TOKENS",
        help="most tokens of prompt and answer together (default: the model's max_seq_len)",
    )
    add(
        "--text",
        metavar="FILE",
        type=path_flag,
        help="with --to: compare on this text (default: the reference of the Python language, "
        "which comes with Python)",
    )
    add(
        "--no-verify",
        action="store_true",
        help="with --to: do not run what was written; the report says so",
    )
    add(
        "--shared_kv",
        choices=SHARED_KV_KINDS,
        help="with --from: what the repeated blocks of a layer-shared model attend to, where the "
        "folder does not say (default: own)",
    )


# Flags that belong to one of the three uses only.
_FOREIGN = {
    "--to": ("input", "shared_kv", "config"),
    "--from": ("checkpoint", "dtype", "context_length", "text", "no_verify", "config"),
    "--estimate": ("input", "output", "dtype", "text", "no_verify", "shared_kv"),
}


def main(args: argparse.Namespace) -> None:
    """Runs the verb; raises UserError for flags that do not go together and for bad folders.

    Args:
      args: beside the flags, `overrides`, the `--config.KEY=VALUE` arguments, and `model_of_run`,
        which reads the `ModelConfig` of a config file with them.
    """
    if args.overrides and args.config is None:
        raise UserError(f"{args.overrides[0]} changes a config file: name it, --config FILE")
    if args.to:
        _check_flags(args, "--to", needed=("checkpoint", "output"))
        _export(args)
    elif args.source:
        _check_flags(args, "--from", needed=("input", "output"))
        _import(args)
    else:
        _check_flags(args, "--estimate", needed=())
        _estimate(args)


def _estimate(args: argparse.Namespace) -> None:
    from mobilellm_jax.export.estimate import estimate_table

    if args.config and args.checkpoint:
        raise UserError("--estimate takes --config or --checkpoint, not both")
    if args.config:
        model = args.model_of_run(args.config, args.overrides)
        models = {Path(args.config.partition(":")[0]).stem: model}
    elif args.checkpoint:
        from mobilellm_jax.checkpoints.loading import load

        models = {Path(args.checkpoint).name: load(args.checkpoint)[0]}
    else:
        print(estimate_table(args.context_length))
        return
    (config,) = models.values()
    print(estimate_table(_context_length(args.context_length, config), models))


def _check_flags(args: argparse.Namespace, use: str, *, needed: tuple[str, ...]) -> None:
    for flag in needed:
        if getattr(args, flag) is None:
            raise UserError(f"convert {use} needs --{flag}")
    for flag in _FOREIGN[use]:
        if getattr(args, flag):
            name = flag.replace("no_verify", "no-verify")
            raise UserError(f"--{name} has no meaning with {use}; leave it out")


def _export(args: argparse.Namespace) -> None:
    from mobilellm_jax.checkpoints.loading import load_model
    from mobilellm_jax.export.report import Report, megabytes, verification_table
    from mobilellm_jax.tokenizers.tokenizer import check_vocabulary

    target = FORMATS[args.to]
    dtype = args.dtype or next(iter(target.tolerances))
    if dtype not in target.tolerances:
        raise UserError(
            f"--dtype {dtype}: {args.to} has {', '.join(target.tolerances)}; use one of them"
        )
    with contextlib.suppress(OSError):  # one of them is not there
        if os.path.samefile(args.checkpoint, args.output):
            raise UserError(f"--output {args.output} is the --checkpoint; choose another folder")
    text, text_name = _read_text(args.text)
    if not args.no_verify:
        for module in target.runtime_modules:
            import_extra(module, target.extra)
    model = load_model(args.checkpoint)
    if model.tokenizer is not None:
        name = f"{args.checkpoint}: tokenizer.model"
        check_vocabulary(model.tokenizer, model.config.vocab_size, name)
    context_length = _context_length(args.context_length, model.config)
    with new_export(args.output) as folder:
        start = time.perf_counter()
        with _clock(f"writing {target.title}"):
            target.write(folder, model, dtype, context_length)
        written = time.perf_counter()
        peak = _peak_memory()
        verification = None
        if not args.no_verify:
            verification = _verify(args.to, folder, model, dtype, context_length, text, text_name)
        report = Report(
            format=args.to,
            dtype=dtype,
            source=str(args.checkpoint),
            config=model.config,
            context_length=context_length,
            file_bytes={file.name: file.stat().st_size for file in sorted(folder.iterdir())},
            write_seconds=written - start,
            verify_seconds=time.perf_counter() - written if verification else 0.0,
            peak_bytes=peak,
            verification=verification,
            metadata=model.to_record(),
        )
        report.write(folder)
    print(f"Wrote {args.output}: {megabytes(sum(report.file_bytes.values()))}.")
    _print_costs(model.config, target)
    if "README.md" in report.file_bytes:
        print(f"How to load it: {args.output}/README.md")
    if verification is None:
        print("Not verified (--no-verify).")
    else:
        print("Verified against the JAX model:\n")
        print(verification_table(verification))


def _verify(name: str, folder: Path, model, dtype: str, context_length: int, text, text_name):
    """Runs what was written; raises UserError if it is too far from the JAX model."""
    from mobilellm_jax.export.verification import verify

    rounded = rounded_params(name, folder, model, dtype)
    with tqdm(total=100, desc="verifying", unit="%", bar_format=_BAR) as bar:

        def on_progress(share: float) -> None:
            bar.update(100 * share - bar.n)

        result = verify(
            model if rounded is None else dataclasses.replace(model, params=rounded),
            FORMATS[name].open(folder, context_length),
            FORMATS[name].tolerances[dtype],
            text=text,
            text_name=text_name,
            unrounded_params=None if rounded is None else model.params,
            on_progress=on_progress,
        )
    if result.problems:
        raise UserError(
            f"what {result.runtime} computes is not the JAX model: {'; '.join(result.problems)}. "
            "Nothing was kept. Please report this with the model's config; --no-verify writes the "
            "file all the same"
        )
    return result


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


@contextlib.contextmanager
def _clock(what: str) -> Iterator[None]:
    """Shows how long something takes that cannot say how far it is."""
    done = threading.Event()

    def tick(bar: tqdm) -> None:
        while not done.wait(1.0):
            bar.refresh()

    with tqdm(bar_format="{desc} ... {elapsed}", desc=what) as bar:
        ticking = threading.Thread(target=tick, args=(bar,), daemon=True)
        if sys.stderr.isatty():
            ticking.start()
        try:
            yield
        finally:
            done.set()


def _peak_memory() -> int:
    """Bytes, of this process or the largest that it started (LiteRT's converter runs in one)."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return unit * max(resource.getrusage(who).ru_maxrss for who in whose)


def _read_text(path: str | None) -> tuple[str, str]:
    """The text to compare on, and its name."""
    if path is None:
        topics = pydoc_data.topics.topics
        return "\n".join(topics[name] for name in sorted(topics)), "Python's language reference"
    try:
        return Path(path).read_text(encoding="utf-8-sig"), path
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def _context_length(asked: int | None, config: ModelConfig) -> int:
    longest = config.max_seq_len
    if asked is None:
        return longest
    if not 2 <= asked <= longest:
        raise UserError(
            f"--context_length {asked}: use 2 to {longest}, the max_seq_len of the model"
        )
    return asked


def _print_costs(config: ModelConfig, target: Format) -> None:
    if target.expands and config.num_repeats > 1:
        from mobilellm_jax.export.estimate import expansion

        print(f"The format has no shared blocks: {expansion(config)}.")


def _import(args: argparse.Namespace) -> None:
    from mobilellm_jax.checkpoints.store import save_model
    from mobilellm_jax.export.report import describe
    from mobilellm_jax.huggingface.folder import read_hf

    model = read_hf(args.input, shared_kv=args.shared_kv)
    # The new workdir starts its own count of steps.
    save_model(
        args.output,
        dataclasses.replace(model, provenance=dataclasses.replace(model.provenance, step=None)),
    )
    print(f"Read {args.input}: {describe(model.config)}.")
    if (stop_ids := model.prompt.stop_ids) is not None:
        print(f"An answer ends with one of the ids {', '.join(map(str, stop_ids))}.")
    print(f"Wrote a checkpoint to {args.output}", end="")
    print(" with its tokenizer." if model.tokenizer else "; there was no tokenizer.model.")
