"""`train`: whole training steps against PyTorch; `losses`: the same steps, number by number."""

import argparse

from tqdm import tqdm

from benchmarks.speed import jax_side, torch_peers
from benchmarks.speed.measure import Side, compare, run_alone
from benchmarks.speed.results import Benchmark
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.costs import train_flops_per_token

EPILOG = """\
examples:
  python -m benchmarks.speed train --preset 125m --batch_size 2 --sequence_length 512
  python -m benchmarks.speed train --preset 350m --batch_size 32 --remat dots --sides jax
  python -m benchmarks.speed train --model num_layers=4 embed_dim=128 num_heads=4 num_kv_heads=2 \\
      head_dim=32 ffn_dim=384 vocab_size=512 --batch_size 2 --sequence_length 64
  python -m benchmarks.speed losses --preset 125m --batch_size 1 --sequence_length 256 --steps 50
"""


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.epilog = EPILOG
    jax_side.add_execution_arguments(parser)
    parser.add_argument("--accumulation_steps", type=int, default=1, metavar="N")
    parser.add_argument(
        "--sides", nargs="+", choices=("jax", *torch_peers.TRAIN_PEERS), metavar="SIDE",
        help="jax, torch, torch.compile, liger; default: those that are installed",
    )  # fmt: skip
    if what == "losses":
        parser.add_argument("--steps", type=int, default=50, help="default %(default)s")


def train_sides(bench: Benchmark) -> list[Side]:
    """The sides asked for, or all that can run here; a model with shared layers has no peer."""
    args, config = bench.args, bench.config
    if args.batch_size % args.accumulation_steps:
        raise UserError(
            f"--accumulation_steps {args.accumulation_steps} does not divide --batch_size "
            f"{args.batch_size}"
        )
    settings = {
        "model": config.to_dict(),
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "accumulation_steps": args.accumulation_steps,
        "execution": jax_side.execution_settings(args, config, bench.device, args.sequence_length),
        "platform": bench.device["platform"],
        "exact_matmuls": bench.what == "losses",
    }
    bench.settings = settings
    expressible = config.sharing == "none" and config.ffn == "swiglu"
    chosen = args.sides or [
        "jax",
        *(
            peer
            for peer in torch_peers.TRAIN_PEERS
            if expressible and torch_peers.installed(peer, settings["platform"])
        ),
    ]
    if not expressible and set(chosen) != {"jax"}:
        raise UserError(
            "transformers' Llama has neither shared layers nor ReLU, so only --sides jax can train "
            "this model"
        )
    sides = []
    for name in chosen:
        if name == "jax":
            sides.append(Side(name, jax_side.build_train, settings))
        elif torch_peers.installed(name, settings["platform"]):
            sides.append(Side(name, torch_peers.build_train, settings | {"peer": name}))
        else:
            raise UserError(f"--sides {name}: not installed, or needs a GPU; leave it out")
    return sides


def measure_train(bench: Benchmark) -> None:
    """Tokens per second, MFU by three counts, memory; ratios to torch."""
    args = bench.args
    sides = train_sides(bench)
    bench.sides = compare(sides, num_samples=args.samples, take_turns=bench.take_turns)
    num_tokens = args.batch_size * args.sequence_length
    flops = train_flops_per_token(bench.config, args.sequence_length)
    bench.figures["train_flops_per_token"] = vars(flops)
    peak = bench.sides.get("jax", {}).get("peak_flops")
    for side in bench.sides.values():
        if "error" in side:
            continue
        side["tokens_per_second"] = num_tokens / side["seconds"]["median"]
        if peak:
            mfu = {
                count: value * side["tokens_per_second"] / peak
                for count, value in vars(flops).items()
            }
            if max(mfu.values()) <= 1:  # else the peak was measured while others computed
                side["mfu"] = mfu


def measure_losses(bench: Benchmark) -> None:
    """The largest relative difference of the losses of the same steps.

    fp32 matrix products are exact (no TF32) on all sides here.
    """
    steps = bench.args.steps
    for side in train_sides(bench):
        settings = side.settings | {"steps": steps, "side": side.name}
        try:
            bench.sides[side.name] = {"losses": run_alone(loss_curve, settings)}
        except UserError as error:
            bench.sides[side.name] = {"error": str(error)}
    ours = bench.sides.get("jax", {}).get("losses")
    for name, side in bench.sides.items():
        if ours and name != "jax" and "error" not in side:
            pairs = zip(ours, side["losses"], strict=True)
            side["largest_relative_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)


def loss_curve(settings: dict) -> list[float]:
    """The losses of one side's first steps."""
    build = jax_side.build_train if settings["side"] == "jax" else torch_peers.build_train
    workload = build(settings)
    numbers = tqdm(range(settings["steps"]), desc=settings["side"], unit="step")
    return [workload.run(workload.prepare(number, 1))[0] for number in numbers]
