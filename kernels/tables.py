"""Markdown tables, either whole with aligned columns, or one line at a time as results arrive."""

from collections.abc import Iterable, Sequence


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> str:
    """The first two lines of a table that is printed one line at a time."""
    return f"{line(*names)}\n|{'---|' * len(names)}"


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """All lines of a table; each cell is padded to the width of its column."""
    cells = [list(names), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first, *others = [line(*map(str.ljust, row, widths)) for row in cells]
    return "\n".join([first, line(*("-" * width for width in widths)), *others])
