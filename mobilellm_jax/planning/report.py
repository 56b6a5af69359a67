"""A plan for the reader: on the screen and as Markdown, as JSON, as a picture."""

import dataclasses
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm_jax.planning import plan as planning
from mobilellm_jax.planning.collectives import Collective, traffic
from mobilellm_jax.planning.plan import Memory, Plan, StepTime
from mobilellm_jax.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 1 << 30

ASSUMPTIONS = f"""\
Read off the compiled program: memory, kernel, donation, collectives. Modelled, not measured: time.
Of a GPU's memory JAX hands out 75%, or what XLA_CLIENT_MEM_FRACTION says, here and in the run.
It takes the published rates of the chip; {planning.MATMUL_SHARE:.0%} of the matmul peak; attention
at {planning.ATTENTION_SHARE["splash"]:.0%} of the peak in a fused kernel and \
{planning.ATTENTION_SHARE["xla"]:.0%} without; elementwise work at the memory's bandwidth. The two
figures of a rate are for no collective hidden behind computing, and for all of them hidden."""

_PARTS = {
    "weights": "master weights, fp32",
    "optimizer": "optimizer state, fp32",
    "batch": "batch",
    "padding": "padding of these to tiles",
    "returned": "returned, not in place",
    "temporaries": "temporaries",
    "program": "program",
}
_TIGHT = """\
WARNING: {left:.1%} of the memory is left, less than {least:.0%}. A run keeps more there than its
step: the next batches, the program of evaluation. Raise config.train.accumulation_steps."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """A run to be paid for.

    Attributes:
      tokens: of the whole run.
      price: of one chip for one hour; None leaves the cost out.
    """

    tokens: float
    price: float | None


def plan_dict(plan: Plan, budget: Budget) -> dict:
    """All of a plan and what follows from it, for JSON."""
    values = dataclasses.asdict(plan) | {"fits": plan.fits, "tight": plan.memory.tight}
    values["memory"]["total"] = plan.memory.total
    for row, collective in zip(values["collectives"], plan.collectives, strict=True):
        row["sent_per_chip"] = traffic(collective)
    values["predicted"] = {}
    for name, seconds in _seconds(plan).items():
        values["predicted"][name] = {
            "step_seconds": seconds,
            "tokens_per_second": plan.tokens_per_second(seconds),
            "mfu": plan.mfu(seconds),
            "days": _days(plan, budget, seconds),
            "cost": _cost(plan, budget, seconds),
        }
    return values


def read_plan(values: dict) -> Plan:
    """The plan that `plan_dict` was made of, now or before parts of the memory were counted."""

    def known(kind, found):
        names = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in found.items() if name in names}

    collectives = [
        Collective(**known(Collective, row) | {"axes": tuple(row["axes"])})
        for row in values["collectives"]
    ]
    parts = {
        "memory": Memory(**known(Memory, values["memory"])),
        "step": StepTime(**known(StepTime, values["step"])),
        "collectives": collectives,
    }
    return Plan(**known(Plan, values) | parts)


def plan_text(plan: Plan, budget: Budget) -> str:
    """The tables of one plan."""
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"hardware   {plan.num_chips} chips of {plan.topology}, mesh: {mesh}",
        f"step       {plan.tokens_per_step:,} tokens of {plan.sequence_length} per sequence, "
        f"{plan.tokens_per_step // plan.num_chips:,} per chip",
        f"settings   {settings}",
        f"attention  {plan.attention}",
        f"compiled   in {plan.compile_seconds:.0f} s on this machine",
    ]
    if plan.refused:
        lines += ["", f"DOES NOT FIT: {plan.refused}"]
    else:
        share = plan.donated / (plan.donated + plan.memory.returned)
        lines.append(f"donated    {share:.0%} of what a step returns is updated in place")
    if plan.memory.tight:
        left = 1 - plan.memory.total / plan.memory.capacity
        lines += ["", _TIGHT.format(left=left, least=planning.MIN_HEADROOM)]
    lines += ["", _memory_table(plan)]
    if not plan.refused:
        lines += ["", _network_table(plan), "", _time_table(plan), "", _rate_table(plan, budget)]
        lines += ["", ASSUMPTIONS]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> str:
    memory = plan.memory
    rows = [(_PARTS[name], f"{size / GIB:.3f}") for name, size in _memory_parts(plan).items()]
    if not plan.refused:
        verdict = plan.verdict if plan.fits else plan.verdict.upper()
        rows.append((f"together: {verdict}", f"{memory.total / GIB:.3f}"))
    return table(("memory of a chip", "GiB"), [*rows, ("there is", f"{memory.capacity / GIB:.2f}")])


def _network_table(plan: Plan) -> str:
    grouped = defaultdict(lambda: [0, 0.0, 0.0])
    for collective in plan.collectives:
        entry = grouped[collective.operation, "+".join(collective.axes), collective.dtype]
        entry[0] += collective.count
        entry[1] += collective.count * collective.bytes
        entry[2] += traffic(collective)
    rows = [
        (*key, f"{count:,}", f"{size / 1e6:,.2f}", f"{sent / 1e6:,.2f}")
        for key, (count, size, sent) in sorted(grouped.items(), key=lambda item: -item[1][2])
    ]
    header = ("collectives of a step", "over", "dtype", "times", "MB", "MB sent by a chip")
    return table(header, rows or [("none", "", "", "", "", "")])


def _time_table(plan: Plan) -> str:
    rows = [(name, f"{1e3 * seconds:.2f}") for name, seconds in _parts(plan).items()]
    return table(("time of a step, predicted", "ms"), rows)


def _rate_table(plan: Plan, budget: Budget) -> str:
    header = ["predicted", *_seconds(plan)]
    per_chip = {k: plan.tokens_per_second(s) / plan.num_chips for k, s in _seconds(plan).items()}
    rows = [
        ["step, ms", *(f"{1e3 * s:.1f}" for s in _seconds(plan).values())],
        ["tokens/s", *(f"{rate * plan.num_chips:,.0f}" for rate in per_chip.values())],
        ["tokens/s and chip", *(f"{rate:,.0f}" for rate in per_chip.values())],
        ["MFU, causal", *(f"{plan.mfu(s):.1%}" for s in _seconds(plan).values())],
        [
            f"days for {budget.tokens / 1e9:,.0f}B tokens",
            *(f"{_days(plan, budget, s):,.2f}" for s in _seconds(plan).values()),
        ],
    ]
    if budget.price is not None:
        costs = (f"{_cost(plan, budget, s):,.0f}" for s in _seconds(plan).values())
        rows.append([f"cost at {budget.price:g} per chip and hour", *costs])
    return table(header, rows)


def _seconds(plan: Plan) -> dict[str, float]:
    return {"network not hidden": plan.step.slowest, "network hidden": plan.step.fastest}


def _days(plan: Plan, budget: Budget, seconds: float) -> float:
    return budget.tokens / plan.tokens_per_second(seconds) / 86_400


def _cost(plan: Plan, budget: Budget, seconds: float) -> float | None:
    if budget.price is None:
        return None
    return _days(plan, budget, seconds) * 24 * plan.num_chips * budget.price


def _parts(plan: Plan) -> dict[str, float]:
    parts = {k: v for k, v in dataclasses.asdict(plan.step).items() if k != "network"}
    return parts | {f"network over {k}": v for k, v in plan.step.network.items() if v > 1e-6}


def draw(plans: list[tuple[str, Plan]], path: Path) -> None:
    """A bar of memory and a bar of time for every named plan, as PNG."""
    from matplotlib.figure import Figure

    # A search names its plans by their flags.
    names = [textwrap.fill(name.replace("--config.", ""), 44) for name, _ in plans]
    height = sum(max(0.5, 0.2 * (1 + name.count("\n"))) for name in names)
    figure = Figure(figsize=(11, 1.9 + height), layout="constrained")
    memory, step = figure.subplots(1, 2, sharey=True)
    parts = [_memory_parts(plan) for _, plan in plans]
    _bars(memory, [{name: size / GIB for name, size in row.items()} for row in parts])
    for row, (_, plan) in enumerate(plans):
        capacity = plan.memory.capacity / GIB
        memory.plot([capacity, capacity], [row - 0.45, row + 0.45], color="black", linewidth=2)
        if plan.verdict != "fits":
            color = "tab:orange" if plan.fits else "tab:red"
            memory.text(capacity, row, f" {plan.verdict}", va="center", color=color)
    memory.set(xlabel="GiB of a chip (black: what there is)", yticks=range(len(plans)))
    memory.set_yticklabels(names)
    memory.invert_yaxis()
    _bars(step, [{} if plan.refused else _shares(plan) for _, plan in plans])
    step.set(xlabel="predicted ms of a step for 1,000 tokens on a chip")
    below = (0.5, -0.6 / (height + 0.4))
    for axes in (memory, step):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.patches:  # of refused plans alone there is no time to show
            axes.legend(loc="upper center", bbox_to_anchor=below, ncol=3, frameon=False)
    _save(figure, path)


def _memory_parts(plan: Plan) -> dict[str, int]:
    """Bytes by name, in the order of the table; of a refused plan those that are known."""
    parts = plan.memory.parts
    known = ("weights", "optimizer", "batch") if plan.refused else _PARTS
    return {name: parts[name] for name in known}


def _shares(plan: Plan) -> dict[str, float]:
    tokens = plan.tokens_per_step / plan.num_chips / 1000
    parts = dataclasses.asdict(plan.step)
    parts["network"] = sum(parts["network"].values())
    return {name: 1e3 * seconds / tokens for name, seconds in parts.items()}


def _bars(axes, rows: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    start = [0.0] * len(rows)
    for name in names:
        widths = [row.get(name, 0.0) for row in rows]
        axes.barh(range(len(rows)), widths, left=start, label=name)
        start = [a + b for a, b in zip(start, widths, strict=True)]


def _save(figure: "Figure", path: Path) -> None:
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=130)
    part.replace(path)
