"""The plan of every preset on every platform of its config file, written to docs/plans.

  python benchmarks/plans.py                    # all that are missing; needs both compilers
  python benchmarks/plans.py --platforms h100-8 h100-64 --presets 125m --force
  python benchmarks/plans.py --report           # docs/plans.md and the pictures, from what is there

tests/test_plans.py compiles them again and compares.
"""

import argparse
import json
from pathlib import Path

import jax

from mobilellm_jax.errors import UserError
from mobilellm_jax.files import write_file
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.planning.collectives import traffic
from mobilellm_jax.planning.plan import make_plan
from mobilellm_jax.planning.report import Budget, draw, plan_dict, plan_text, read_plan
from mobilellm_jax.planning.topologies import PLATFORMS, topology
from mobilellm_jax.tables import table
from mobilellm_jax.training.run_config import load_config

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "plans"
BUDGET = Budget(tokens=1e12, price=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platforms", nargs="+", default=list(PLATFORMS), choices=PLATFORMS)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--force", action="store_true", help="also those that are there")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    args = parser.parse_args()
    if args.report:
        write_report()
        return
    jax.config.update("jax_platforms", "cpu")
    for platform in args.platforms:
        hardware = topology(platform)
        for preset in args.presets:
            path = FOLDER / platform / f"{preset}.json"
            if path.exists() and not args.force:
                continue
            plan = make_plan(load_config(f"{ROOT}/configs/{preset}.py:{platform}"), hardware, 2048)
            if not plan.fits:
                print(plan_text(plan, BUDGET))
                raise UserError(f"{preset} does not fit {platform}: change configs/{preset}.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            values = plan_dict(plan, BUDGET) | {"jax": jax.__version__}
            write_file(path, (json.dumps(values, indent=1) + "\n").encode())
            print(
                f"{platform} {preset}: {plan.memory.total / plan.memory.capacity:.0%} of memory, "
                f"compiled in {plan.compile_seconds:.0f} s",
                flush=True,
            )


def write_report() -> None:
    """One table and one picture for each platform."""
    lines = [
        "# Plans",
        "",
        "Made by `benchmarks/plans.py --report`; docs/scaling.md explains them.",
    ]
    for platform, name in PLATFORMS.items():
        found = {
            preset: json.loads(path.read_text())
            for preset in PRESETS
            if (path := FOLDER / platform / f"{preset}.json").exists()
        }
        if not found:
            continue
        plans = [(preset, read_plan(values)) for preset, values in found.items()]
        draw(plans, FOLDER / f"{platform}.png")
        versions = ", ".join(sorted({values["jax"] for values in found.values()}))
        lines += [
            "",
            f"## {platform} ({name})",
            "",
            f"jax {versions}; 1024 x 2048 tokens a step.",
            "",
        ]
        lines += [plan_table(plans), "", f"![memory and time](plans/{platform}.png)"]
    write_file(FOLDER.with_suffix(".md"), ("\n".join(lines) + "\n").encode())


def plan_table(plans) -> str:
    header = (
        "preset", "data x fsdp", "gather", "remat", "parts", "kernel", "state, GiB",
        "temporaries, GiB", "of memory", "sent by a chip, MB", "network / computing",
        "tokens/s and chip", "MFU", "days for 1T tokens",
    )  # fmt: skip
    rows = []
    for preset, plan in plans:
        seconds = (plan.step.slowest, plan.step.fastest)
        rates = [plan.tokens_per_second(s) / plan.num_chips for s in seconds]
        rows.append((
            preset,
            f"{plan.mesh['data']} x {plan.mesh['fsdp']}",
            plan.settings["gather"],
            plan.settings["remat"],
            str(plan.settings["accumulation_steps"]),
            plan.attention,
            f"{plan.state / (1 << 30):.3f}",
            f"{plan.memory.temporaries / (1 << 30):.1f}",
            f"{plan.memory.total / plan.memory.capacity:.0%}",
            f"{sum(map(traffic, plan.collectives)) / 1e6:,.0f}",
            f"{sum(plan.step.network.values()) / plan.step.compute:.0%}",
            " to ".join(f"{rate:,.0f}" for rate in rates),
            " to ".join(f"{plan.mfu(s):.0%}" for s in seconds),
            " to ".join(f"{1e12 / plan.tokens_per_second(s) / 86_400:.2f}" for s in seconds),
        ))  # fmt: skip
    return table(header, rows)


if __name__ == "__main__":
    main()
