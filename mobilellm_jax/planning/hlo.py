"""The text of a compiled program (`compiled.as_text()`), read as far as the planner needs it.

The forms read here are those that XLA's CPU, GPU and TPU compilers print (jaxlib 0.10.2, libtpu
0.0.48); names are XLA's, see openxla.org/xla/operation_semantics.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a computation: `name = shape opcode(rest`."""

    opcode: str
    shape: str
    rest: str  # operands and attributes

    def attribute(self, pattern: str) -> str | None:
        """The first group of the first match."""
        found = re.search(pattern, self.rest)
        return found and found[1]

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Type, dimensions and bytes of what it gives: one array, or those of a tuple."""
        found = []
        for dtype, dims in re.findall(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\]", self.shape):
            bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
            sizes = tuple(int(dim) for dim in dims.split(",") if dim)
            found.append((dtype, sizes, math.prod(sizes) * bits // 8))
        return found

    @property
    def operands(self) -> list[str]:
        """Names of the instructions it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


def parse(hlo_text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each its instructions by name ("ROOT" is the last), and the entry."""
    computations, entry, current = {}, "", {}
    for line in hlo_text.splitlines():
        if line[:1] not in (" ", "") and line.endswith("{"):
            name = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            current = computations[name[2]] = {}
            entry = name[2] if name[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
            instruction = Instruction(found[4], found[3], found[5])
            current[found[2]] = instruction
            if found[1]:
                current["ROOT"] = instruction
    assert entry, "not the text of an HLO module"
    return computations, entry


def trip_count(computations, around: dict[str, Instruction], loop: Instruction) -> int:
    """Rounds of a loop: as XLA noted it, else (TPU) from its start, bound and step."""
    if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = computations[loop.attribute(r"body=%?([\w.\-]+)")]
    compare = condition["ROOT"]
    assert compare.opcode == "compare" and "direction=LT" in compare.rest, compare
    counter, bound = compare.operands
    index = int(condition[counter].attribute(r"index=(\d+)"))
    start = _constant(around, around[loop.operands[0]].operands[index]) or 0
    stop = _constant(condition, bound)
    addends = body[body["ROOT"].operands[index]].operands
    step = next(filter(None, (_constant(body, name) for name in addends)), None)
    assert stop is not None and step is not None, loop
    return math.ceil((stop - start) / step)


def executed(
    computations: dict[str, dict[str, Instruction]], name: str, times: int = 1
) -> Iterator[tuple[int, dict[str, Instruction], str, Instruction]]:
    """Every instruction that is run for itself, not as part of a fusion, from a computation on.

    Yields how often it is run, the computation around it, its name and itself; loops and calls
    come before what is in them.
    """
    around = computations[name]
    for key, instruction in around.items():
        if key == "ROOT":
            continue
        yield times, around, key, instruction
        if instruction.opcode == "while":
            rounds = trip_count(computations, around, instruction)
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            yield from executed(computations, body, times * rounds)
        elif instruction.opcode in ("call", "async-start"):
            callee = instruction.attribute(r"(?:to_apply|calls)=%?([\w.\-]+)")
            yield from executed(computations, callee, times)


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    if instruction.opcode != "constant":
        return None
    return int(instruction.rest.partition(")")[0])
