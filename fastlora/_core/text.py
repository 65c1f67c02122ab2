"""Numbers and plain tables for a terminal or a log."""

import math
import re
from collections.abc import Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def readable_bytes(size: int) -> str:
    """A size with three digits or so.

    Example:
        >>> [readable_bytes(size) for size in (0, 1000, 2048, 3 * 2**30 // 2)]
        ['0 B', '1000 B', '2.0 KiB', '1.5 GiB']
    """
    power = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    if power == 0:
        return f"{size} B"
    number = size / 1024**power
    return f"{number:,.{1 if number < 100 else 0}f} {_UNITS[power]}"


def readable_percent(percent: float) -> str:
    """A percentage without its sign, with two digits that count, never as an exponent.

    Example:
        >>> [readable_percent(percent) for percent in (100.0, 12.34, 1.012, 0.6789, 0.01234, 0.0)]
        ['100', '12.3', '1.01', '0.68', '0.012', '0']
    """
    if percent <= 0 or percent >= 99.95:
        return f"{percent:.0f}"
    if percent >= 10:
        return f"{percent:.1f}"
    return f"{percent:.{max(2, 1 - math.floor(math.log10(percent)))}f}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the heading first, in columns: the first two to the left, numbers to the right.

    Example:
        >>> print(text_table([("Module", "Kind", "Parameters"), ("fc", "Linear", "12")]))
        Module  Kind    Parameters
        fc      Linear          12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def common_name(names: Sequence[str]) -> str:
    """One name for names that differ in their numbers only.

    Example:
        >>> common_name(["blocks.0.fc.1", "blocks.1.fc.1", "blocks.2.fc.1"])
        'blocks.[0-2].fc.1'
        >>> common_name(["net.0", "net.3"])
        'net.[0,3]'
    """
    parts = [re.split(r"(\d+)", name) for name in names]
    return "".join(_common_part(column) for column in zip(*parts, strict=True))


def _common_part(column: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(column))
    if len(distinct) == 1:
        return distinct[0]
    numbers = sorted(map(int, distinct))
    first, last = numbers[0], numbers[-1]
    if numbers == list(range(first, last + 1)):
        return f"[{first}-{last}]"
    return f"[{','.join(map(str, numbers))}]"
