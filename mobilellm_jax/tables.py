"""Tables and numbers for the screen and for Markdown files."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as it is."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    head = [cell.ljust(width) for cell, width in zip(header, widths, strict=True)]
    lines = [head, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """A loss, a perplexity, ...: four decimals, or four digits and an exponent if it is large."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"
