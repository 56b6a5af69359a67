"""The plan of every preset on every platform of its config file, compiled and written to docs/plans.

  python benchmarks/plans.py                    # all that are missing; needs both compilers
  python benchmarks/plans.py --platforms h100-8 h100-64 --presets 125m --force

tests/test_plans.py compiles them again and compares.
"""

import argparse
import json
from pathlib import Path

import jax

from mobilellm_jax.errors import UserError
from mobilellm_jax.files import write_file
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.planning.plan import make_plan
from mobilellm_jax.planning.report import Budget, plan_dict, plan_text
from mobilellm_jax.planning.topologies import PLATFORMS, topology
from mobilellm_jax.training.run_config import load_config

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "plans"
BUDGET = Budget(tokens=1e12, price=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platforms", nargs="+", default=list(PLATFORMS), choices=PLATFORMS)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--force", action="store_true", help="also those that are there")
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
