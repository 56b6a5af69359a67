"""The order in which stored blocks are executed, and where each execution keeps keys and values.

The one rule of layer sharing: training, decoding, PyTorch and exports read it from here, by
`ModelConfig.visits`.
"""

import dataclasses


def _static():
    return dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Visit:
    """One execution of a stored block.

    Training scans over the blocks, so a field that differs from block to block is a traced number
    there; the others are marked as static.

    Attributes:
      block: number of the stored block, from 0.
      cache_slot: number of the keys and values that it attends to. Slots are numbered in the order
        in which they are filled.
      repeat: how often the block was visited before.
      projects_kv: whether it projects these keys and values itself, or takes those that an earlier
        visit of the block has left in the slot.
    """

    block: int
    cache_slot: int
    repeat: int = _static()
    projects_kv: bool = _static()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One pass over all stored blocks.

    Attributes:
      repeats: the visits that it makes of a block, one right after the other.
      reverse: whether it runs from the last block to the first.
    """

    repeats: range
    reverse: bool


def list_sweeps(sharing: str, num_repeats: int) -> tuple[Sweep, ...]:
    """The passes over the stored blocks that `ModelConfig.sharing` means (paper, figure 6).

    "none" and "immediate" are one sweep that visits each block R times in a row; the other orders
    are R sweeps of one visit each.
    """
    if sharing in ("none", "immediate"):
        return (Sweep(range(num_repeats), reverse=False),)
    turns = sharing == "reverse"
    return tuple(
        Sweep(range(number, number + 1), reverse=turns and number % 2 == 1)
        for number in range(num_repeats)
    )


def list_visits(num_layers: int, sweeps: tuple[Sweep, ...], shared_kv: str) -> tuple[Visit, ...]:
    """The executions of stored blocks, in order."""
    found: list[Visit] = []
    slot_of_block: dict[int, int] = {}
    num_slots = 0
    for sweep in sweeps:
        blocks = range(num_layers)
        for block in reversed(blocks) if sweep.reverse else blocks:
            for repeat in sweep.repeats:
                projects_kv = repeat == 0 or shared_kv == "own"
                if projects_kv:
                    slot_of_block[block] = num_slots
                    num_slots += 1
                found.append(Visit(block, slot_of_block[block], repeat, projects_kv))
    return tuple(found)
