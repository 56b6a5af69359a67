"""`python -m benchmarks.speed WHAT --preset 125m ...`, from the repository root.

Each WHAT imports only what it needs: on a machine with a GPU, jax, flax, optax, numpy, tqdm, torch
and transformers are enough for all but `load` and `checkpoint`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mobilellm_jax.errors import UserError

# WHAT -> (module, function that measures, default batch, length and samples, one line of help).
WHATS = {
    "train": ("train", "measure_train", (2, 512, 10), "training steps against PyTorch, and MFU"),
    "losses": (
        "train",
        "measure_losses",
        (1, 256, 1),
        "losses of the same steps against PyTorch's",
    ),
    "techniques": (
        "techniques",
        "measure",
        (2, 512, 3),
        "training steps with one choice made otherwise, each alone",
    ),
    "products": ("products", "measure", (2, 512, 5), "each matrix product of a step by itself"),
    "attention": ("attention", "measure", (2, 512, 10), "each attention kernel that runs here"),
    "loss": ("loss", "measure", (2, 512, 10), "cross-entropy in slices against all logits at once"),
    "decode": ("generation", "measure_decode", (1, None, 10), "greedy decoding against `generate`"),
    "prefill": ("generation", "measure_prefill", (1, None, 10), "prompts until their first token"),
    "load": ("load", "measure", (16, None, 10), "steps on loaded batches against one fixed batch"),
    "checkpoint": ("checkpoint", "measure", (1, 128, 4), "what saving and restoring hold up"),
    "compile": ("startup", "measure", (2, 512, 3), "from the command to the first step"),
}
# Not measurements of one thing: (module, one line of help).
OTHERS = {
    "gpu": ("gpu", "everything that is asked of a GPU, in a fixed time"),
    "report": ("report", "docs/performance.md from docs/performance/*.json"),
}

_EPILOG = """\
examples:
  python -m benchmarks.speed train --preset 125m --batch_size 2 --sequence_length 512
  python -m benchmarks.speed decode --preset 125m --prompt_length 32 --num_tokens 64
  python -m benchmarks.speed compile --preset 1.5b
  python -m benchmarks.speed gpu --budget 540
  python -m benchmarks.speed report

Each run writes a JSON file (hardware, versions, date, command, every sample) and prints a table.
`WHAT --help` has its flags. How things are timed is said in benchmarks/speed/measure.py, what
PyTorch's side does in benchmarks/speed/torch_peers.py. On a CPU nothing else should be running.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if one of our own sides failed; 2 for a mistake that the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    what = arguments[0] if arguments and arguments[0] in {**WHATS, **OTHERS} else None
    try:
        args = _parser(what).parse_args(arguments)
        module = importlib.import_module(f"benchmarks.speed.{(WHATS | OTHERS)[what][0]}")
        return module.main(args) if what in OTHERS else _run(what, args, module, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(what: str, args: argparse.Namespace, module, arguments: Sequence[str]) -> int:
    from benchmarks.speed import results
    from benchmarks.speed.cases import model_config
    from benchmarks.speed.columns import result_table
    from benchmarks.speed.jax_side import device_facts
    from benchmarks.speed.measure import run_alone

    for name in ("batch_size", "sequence_length", "samples"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: use 1 or more")
    bench = results.Benchmark(
        what=what,
        args=args,
        command=" ".join(["python -m benchmarks.speed", *arguments]),
        config=model_config(args.preset, args.model),
        device=run_alone(device_facts, {}),
    )
    getattr(module, WHATS[what][1])(bench)
    result = bench.to_dict()
    path = Path(args.output) if args.output else results.default_output(result)
    results.write_results(result, path)
    hardware = result["hardware"]
    print(f"\n{what} on {hardware['device_kind']} ({hardware['cpu']}, {hardware['cores']} cores)\n")
    print(result_table([result], absolute=True))
    print(f"\n{path}")
    return 1 if bench.failed else 0


def _parser(what: str | None) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="How fast training and decoding are, against PyTorch in the same run.",
        epilog=_EPILOG,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    whats = parser.add_subparsers(metavar="WHAT", required=True)
    for name, (module, *_, summary) in (WHATS | OTHERS).items():
        sub = whats.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=formatter,
            allow_abbrev=False,
        )
        if name == what:
            if name in WHATS:
                _add_common(sub, WHATS[name][2])
            importlib.import_module(f"benchmarks.speed.{module}").add_arguments(sub, name)
    return parser


def _add_common(parser: argparse.ArgumentParser, defaults: tuple[int, int | None, int]) -> None:
    add = parser.add_argument
    add("--preset", default="125m", help="of mobilellm_jax/model/presets.py (default 125m)")
    add("--model", nargs="+", default=[], metavar="FIELD=VALUE", help="changes of the preset")
    add("--batch_size", type=int, default=defaults[0], metavar="B", help="default %(default)s")
    if defaults[1] is not None:
        add(
            "--sequence_length",
            type=int,
            default=defaults[1],
            metavar="T",
            help="default %(default)s",
        )
    add("--samples", type=int, default=defaults[2], metavar="N", help="default %(default)s")
    add("--output", metavar="FILE", help="default: runs/speed/WHAT-PRESET-....json")


if __name__ == "__main__":
    sys.exit(main())
