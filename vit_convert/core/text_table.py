"""Plain-text tables, for a host that has only numpy and TensorRT."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table: the first column left-aligned, numbers right-aligned.

    Args:
        header: names of the columns.
        rows: the cells.

    Returns:
        The lines, without a final newline.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
