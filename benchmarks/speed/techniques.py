"""`techniques`: the training step with one choice made otherwise, each alone.

Each is timed in turns with the step as it ships: above 1, what ships pays. Three put what one
writes down first in the place of a technique: "products-by-autodiff" of our own gradients of the
products, "attention-at-once" (softmax over all scores) of attention in blocks or by a kernel,
"logits-at-once" of the loss in slices with its own gradient. The others are ways to execute.

"huge-pages" has glibc ask Linux for pages of 2 MB (GLIBC_TUNABLES=glibc.malloc.hugetlb=1): XLA
on CPU allocates a step's temporaries anew each time, and they come page by page.
"""

import argparse
import sys

import jax
import jax.numpy as jnp

from benchmarks.speed import jax_side
from benchmarks.speed.measure import Side, Workload, compare
from benchmarks.speed.results import Benchmark
from mobilellm_jax.errors import UserError
from mobilellm_jax.objectives.embedding_gradient import ShardedGradTable

SHIPPED = "as shipped"
_SIDES_AT_ONCE = 3  # beside the step as it ships; each holds a state of its own
# Name -> changes of `Execution`.
EXECUTIONS = {
    "remat-none": {"remat": "none"},
    "remat-attention": {"remat": "attention"},
    "remat-full": {"remat": "full"},
    "unrolled": {"unroll_layers": True},
    "unrolled-remat-none": {"unroll_layers": True, "remat": "none"},
}
HUGE_PAGES = "huge-pages"

EPILOG = """\
example:
  python -m benchmarks.speed techniques --preset 125m --batch_size 2 --sequence_length 512
"""


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    parser.epilog = EPILOG
    jax_side.add_execution_arguments(parser)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=names(), help=", ".join(names())
    )


def names() -> list[str]:
    """All that can be compared with the step as it ships."""
    return [*_TAKEN_OUT, *EXECUTIONS, HUGE_PAGES]


def measure(bench: Benchmark) -> None:
    """Time and memory of each, of those of the step as it ships in the same turns."""
    args, config = bench.args, bench.config
    length = args.sequence_length
    bench.settings = {
        "model": config.to_dict(),
        "batch_size": args.batch_size,
        "sequence_length": length,
        "accumulation_steps": 1,
        "execution": jax_side.execution_settings(args, config, bench.device, length),
        "platform": bench.device["platform"],
        "exact_matmuls": False,
    }
    chosen = args.only or names()
    if HUGE_PAGES in chosen and (bench.device["platform"] != "cpu" or sys.platform != "linux"):
        if args.only:
            raise UserError(f"--only {HUGE_PAGES}: of a Linux machine's CPU alone")
        chosen.remove(HUGE_PAGES)
    for start in range(0, len(chosen), _SIDES_AT_ONCE):
        group = [_side(name, bench.settings) for name in chosen[start : start + _SIDES_AT_ONCE]]
        shipped = Side(SHIPPED, build, bench.settings | {"without": None})
        found = compare([shipped, *group], num_samples=args.samples, take_turns=bench.take_turns)
        of = found[SHIPPED]
        for side in found.values():
            if "error" not in side and "error" not in of:
                tokens = args.batch_size * length
                side["tokens_per_second"] = tokens / side["seconds"]["median"]
                side["time_of_shipped"] = side["seconds"]["median"] / of["seconds"]["median"]
                side["memory_of_shipped"] = side["peak_bytes"] / of["peak_bytes"]
        # Of the step as it ships, those of the first turns.
        bench.sides |= {k: side for k, side in found.items() if k not in bench.sides}


def _side(name: str, settings: dict) -> Side:
    if name in EXECUTIONS:
        settings = settings | {"execution": settings["execution"] | EXECUTIONS[name]}
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if name == HUGE_PAGES else {}
    without = name if name in _TAKEN_OUT else None
    return Side(name, build, settings | {"without": without}, environment)


def build(settings: dict) -> Workload:
    """Our training step; in this process, which is its own, one technique may be taken out."""
    if settings["without"]:
        _TAKEN_OUT[settings["without"]]()
    return jax_side.build_train(settings)


def _project_by_autodiff():
    from mobilellm_jax.model import block, layers

    block.project = layers._product


def _attention_at_once():
    from mobilellm_jax.model import attention

    def attend(q_BTNH, key_value, *, segment_ids_BT, kind):
        keys_BSKH, values_BSKH = (x.swapaxes(1, 2) for x in key_value)
        return jax.nn.dot_product_attention(
            q_BTNH, keys_BSKH, values_BSKH, is_causal=True, implementation="xla"
        )

    attention.causal_attention = attend


def _logits_at_once():
    from mobilellm_jax.objectives import next_token

    def cross_entropy_sum(hidden_BTD, head: ShardedGradTable, targets_BT, weights_BT):
        head_VD = head.values + (head.shards - jax.lax.stop_gradient(head.shards))[0]
        logits = jnp.einsum(
            "BTD,VD->BTV",
            hidden_BTD,
            head_VD.astype(hidden_BTD.dtype),
            preferred_element_type=jnp.float32,
        )
        of_targets = jnp.take_along_axis(
            jax.nn.log_softmax(logits), targets_BT[..., None], axis=-1
        )[..., 0]
        return -(of_targets * weights_BT).sum()

    next_token.cross_entropy_sum = cross_entropy_sum


_TAKEN_OUT = {
    "products-by-autodiff": _project_by_autodiff,
    "attention-at-once": _attention_at_once,
    "logits-at-once": _logits_at_once,
}
