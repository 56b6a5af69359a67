"""`mobilellm plan`."""

import argparse
import json
import math
import sys
from pathlib import Path

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.paths import path_flag

_EPILOG = """\
The training step of the config is compiled for the hardware by its real compiler, on this machine,
which needs no TPU or GPU. What is read off it: memory of a chip, attention kernel, donation, every
collective with its bytes. What is modelled from published rates: the time. --config.KEY=VALUE
changes values as in `mobilellm train`. Exit status: 0 it fits, 3 it does not, 2 a mistake to mend.

hardware:
  v5e:16x16, v6e:16x16, v5p:8x8x4, v4:4x4x4   TPU slices; needs pip install '.[tpu]'
  h100:8, h200:8, a100:8, h100:8x8            GPUs, or hosts x GPUs; needs pip install '.[cuda]'

examples:
  mobilellm plan --config configs/350m.py:v5e-256 --topology v5e:16x16 --tokens 1e12 --price 1.2
  mobilellm plan --config configs/1.5b.py --topology h100:8 --search --output plans/1.5b
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan`; overrides of the config are taken by the command line as they are."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", type=path_flag, help="a file as in configs/")
    add("--topology", required=True, metavar="NAME", help="the hardware, as listed below")
    add("--sequence_length", type=int, metavar="T", help="default: the model's max_seq_len")
    add(
        "--search",
        action="store_true",
        help="try meshes, accumulation and remat, the most promising first, until three fit",
    )
    add("--tokens", type=float, default=1e12, metavar="N", help="of the whole run (default: 1e12)")
    add("--price", type=float, metavar="P", help="of a chip for an hour, in any currency")
    add("--output", metavar="DIR", type=path_flag, help="for plan.json, plan.md and plan.png")
    add("--config.KEY=VALUE", dest="_", action="store_true", help="change one value of the config")


def main(args: argparse.Namespace) -> None:
    """Runs the verb; `args.overrides` are the `--config.KEY=VALUE` arguments."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the hardware is not here, and is not looked for
    from mobilellm_jax.planning.plan import make_plan
    from mobilellm_jax.planning.report import Budget, plan_text
    from mobilellm_jax.planning.topologies import topology
    from mobilellm_jax.training.run_config import load_config

    config = load_config(args.config, args.overrides)
    for name in ("tokens", "price", "sequence_length"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g}: use a number of more than 0")
    length = args.sequence_length or config.model.max_seq_len
    if length > config.model.max_seq_len:  # as `train` refuses the data
        raise UserError(
            f"--sequence_length {length}: config.model.max_seq_len is {config.model.max_seq_len}; "
            f"set --config.model.max_seq_len={length} too, or plan shorter sequences"
        )
    hardware = topology(args.topology)
    if args.output is not None:
        _make_folder(args.output)  # before minutes of compiling, not after
    budget = Budget(args.tokens, args.price)
    if args.search:
        plans = _search(config, hardware, length)
        if not any(plan.fits for _, plan in plans):
            print(
                f"nothing that was tried fits {args.topology}; take more chips or a smaller batch",
                file=sys.stderr,
            )
        if not plans:  # by a rough count of memory already
            raise SystemExit(3)
    else:
        print(f"compiling for {args.topology}; this takes up to two minutes ...", flush=True)
        plans = [(Path(args.config).name, make_plan(config, hardware, length))]
    best = plans[0][1]
    text = plan_text(best, budget)
    print(text)
    if args.output is not None:
        _write(Path(args.output), plans, text, budget)
    if not best.fits:
        raise SystemExit(3)


def _search(config, hardware, length) -> list:
    """All that was compiled: what fits first, the fastest first; says so while it goes on."""
    from mobilellm_jax.planning.search import search
    from mobilellm_jax.tables import table

    rows, plans = [], []
    for number, (_, plan) in enumerate(search(config, hardware, length), 1):
        name = _flags(plan)
        print(
            f"{number}. {name}: {plan.verdict}, compiled in {plan.compile_seconds:.0f} s",
            flush=True,
        )
        plans.append((name, plan))
    plans.sort(key=lambda pair: (not pair[1].fits, pair[1].step.slowest))
    for name, plan in plans:
        rate = f"{plan.tokens_per_second(plan.step.slowest):,.0f}" if plan.fits else ""
        rows.append((rate, plan.verdict, plan.share_of_memory, name))
    header = ("tokens/s, network not hidden", "verdict", "of memory", "settings")
    if rows:
        print("\n" + table(header, rows) + "\n")
    return plans


def _flags(plan) -> str:
    """The flags of `train` that give the plan's settings."""
    values = {f"mesh.{axis}": size for axis, size in plan.mesh.items()}
    values |= {
        "mesh.gather": plan.settings["gather"],
        "execution.remat": plan.settings["remat"],
        "execution.unroll_layers": plan.settings["unroll_layers"],
        "train.accumulation_steps": plan.settings["accumulation_steps"],
    }
    return " ".join(f"--config.{key}={value}" for key, value in values.items())


def _make_folder(output: str) -> None:
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {output!r}: cannot be made a folder ({error.strerror}); name another"
        ) from error


def _write(folder: Path, plans: list, text: str, budget) -> None:
    from mobilellm_jax.planning.report import draw, plan_dict
    from mobilellm_jax.storage.atomic import write_file

    values = [{"name": name, **plan_dict(plan, budget)} for name, plan in plans]
    write_file(folder / "plan.json", (json.dumps(values, indent=2) + "\n").encode())
    write_file(folder / "plan.md", f"# {plans[0][0]}\n\n{text}\n".encode())
    draw(plans, folder / "plan.png")
    print(f"\nwritten: plan.json, plan.md, plan.png in {folder}")
