"""Tables in Markdown: all at once with aligned columns, or a line at a time as results come in."""

from collections.abc import Iterable, Sequence


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> str:
    """The first two lines of a table that is shown a line at a time."""
    return f"{line(*names)}\n|{'---|' * len(names)}"


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """All lines of a table; each cell is padded to the width of its column."""
    cells = [list(names), *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width for width in widths]
    padded = ((cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    first, *others = (line(*row) for row in padded)
    return "\n".join([first, line(*rule), *others])
