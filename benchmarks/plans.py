"""The plan of every preset on every platform of its config file, written to docs/plans.

  python benchmarks/plans.py                    # all that are missing; needs both compilers
  python benchmarks/plans.py --platforms h100-8 h100-64 --presets 125m --force
  python benchmarks/plans.py --scaling h100     # one batch on 8 to 512 chips
  python benchmarks/plans.py --report           # docs/plans.md and the pictures, from what is there

tests/test_plans.py compiles them again and compares.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.planning.collectives import traffic
from mobilellm_jax.planning.plan import make_plan
from mobilellm_jax.planning.report import Budget, draw, plan_dict, plan_text, read_plan
from mobilellm_jax.planning.topologies import PLATFORMS, topology
from mobilellm_jax.storage.atomic import write_file
from mobilellm_jax.tables import table
from mobilellm_jax.training.run_config import load_config

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "plans"
BUDGET = Budget(tokens=1e12, price=None)
# The same 1024 x 2048 tokens per step on more and more chips: (data, fsdp) by topology, and the
# most sequences that a chip computes at a time.
SCALING_PRESETS = ("125m", "1.5b")
SCALING = {
    "h100": (16, {"8": (1, 8), "4x8": (4, 8), "16x8": (16, 8), "64x8": (64, 8)}),
    "v5p": (16, {"2x2x2": (1, 8), "4x4x2": (4, 8), "8x4x4": (16, 8), "8x8x8": (64, 8)}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platforms", nargs="+", default=list(PLATFORMS), choices=PLATFORMS)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--force", action="store_true", help="also those that are there")
    parser.add_argument("--scaling", choices=SCALING, help="one batch on 8 to 512 chips")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.report:
        write_report()
    elif args.scaling:
        plan_scaling(args.scaling)
    else:
        plan_platforms(args)


def plan_platforms(args) -> None:
    """Every preset on every platform, with the settings of its config file."""
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
            write_plan(plan, path)
            print(
                f"{platform} {preset}: {plan.share_of_memory} of memory, "
                f"compiled in {plan.compile_seconds:.0f} s",
                flush=True,
            )


def write_plan(plan, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = plan_dict(plan, BUDGET) | {"jax": jax.__version__}
    write_file(path, (json.dumps(values, indent=1) + "\n").encode())


def plan_scaling(kind: str) -> None:
    """The batch of the recipe on more and more chips of one kind."""
    most_rows, layouts = SCALING[kind]
    for preset, (layout, (data, fsdp)) in itertools.product(SCALING_PRESETS, layouts.items()):
        config = load_config(f"{ROOT}/configs/{preset}.py")
        rows = config.train.global_batch_size // (data * fsdp)
        config.mesh.update(data=data, fsdp=fsdp)
        config.train.accumulation_steps = max(1, rows // most_rows)
        plan = make_plan(config, topology(f"{kind}:{layout}"), 2048)
        assert plan.fits, plan_text(plan, BUDGET)
        write_plan(plan, FOLDER / "scaling" / f"{kind}-{data * fsdp}-{preset}.json")
        print(
            f"{kind} {data * fsdp} {preset}: compiled in {plan.compile_seconds:.0f} s", flush=True
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
    lines += scaling_report()
    write_file(FOLDER.with_suffix(".md"), ("\n".join(lines) + "\n").encode())


def scaling_report() -> list[str]:
    """A table and a picture of one batch on 8 to 512 chips."""
    plans = {}
    for path in (FOLDER / "scaling").glob("*.json"):
        plan = read_plan(json.loads(path.read_text()))
        plans[path.stem.split("-")[0], path.stem.split("-")[2], plan.num_chips] = plan
    plans = dict(sorted(plans.items()))
    rows = [
        (
            kind,
            preset,
            str(chips),
            f"{plan.tokens_per_step // chips:,}",
            f"{sum(map(traffic, plan.collectives)) / 1e6:,.0f}",
            f"{1 - plan.step.compute / plan.step.slowest:.1%}",
            " to ".join(
                f"{plan.tokens_per_second(s) / 1e6:.2f}"
                for s in (plan.step.slowest, plan.step.fastest)
            ),
        )
        for (kind, preset, chips), plan in plans.items()
    ]
    header = (
        "chip", "preset", "chips", "tokens of a chip and step", "sent by a chip, MB",
        "share of the step on the network, nothing hidden", "million tokens/s",
    )  # fmt: skip
    draw_scaling(plans, FOLDER / "scaling.png")
    return [
        "",
        "## 8 to 512 chips",
        "",
        "1024 x 2048 tokens a step, shared by more and more chips; layers scanned, remat dots.",
        "",
        table(header, rows),
        "",
        "![tokens per second and chip](plans/scaling.png)",
    ]


def draw_scaling(plans: dict, path: Path) -> None:
    """Tokens per second and chip against chips: a band from nothing to everything hidden."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), SCALING, strict=True):
        for preset in SCALING_PRESETS:
            found = [(n, plan) for (k, p, n), plan in plans.items() if (k, p) == (kind, preset)]
            chips = [n for n, _ in found]
            low, high = (
                [plan.tokens_per_second(getattr(plan.step, which)) / n / 1e3 for n, plan in found]
                for which in ("slowest", "fastest")
            )
            axes.plot(chips, low, marker="o", label=f"{preset}, no network hidden")
            axes.fill_between(chips, low, high, alpha=0.3)
        axes.set(xscale="log", yscale="log", title=kind, xlabel="chips", xticks=chips)
        axes.set_xticks([], minor=True)
        axes.set_xticklabels(chips)
        axes.set_yticks([20, 50, 100, 200, 400], ["20", "50", "100", "200", "400"])
        axes.set_yticks([], minor=True)
        axes.legend(frameon=False)
    figure.supylabel("1,000 tokens/s and chip, predicted")
    figure.savefig(path, dpi=130)


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
