"""The regression gate: what the compiler makes of the kernels now, against the committed table.

A worse figure in the table is a decision that a reader of the diff can see.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, fields

from fastlora_kernels.compiled import FILE, VERSION_LINE, Row, committed


def table_text(rows: Iterable[Row], triton_version: str) -> str:
    """The table as a file.

    Args:
        rows: What was compiled, in any order.
        triton_version: The version of Triton that made them.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=repr):
        kinds = " ".join(f"{kind}:{count}" for kind, count in sorted(row.matrix_instructions.items()))
        values = {**asdict(row), "matrix_instructions": kinds}
        writer.writerow(
            {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}
        )
    return f"{VERSION_LINE}{triton_version}\n{out.getvalue()}"


def worse_than_committed(rows: Iterable[Row]) -> list[str]:
    """One line for every figure that is worse than the committed one, and for every kernel without one."""
    before: dict[tuple[str | int, ...], list[Row]] = {}
    for row in committed()[1]:
        before.setdefault(row.key, []).append(row)
    lines = []
    for row in rows:
        if row.key not in before:
            lines.append(f"{row.key} is not in {FILE}")
            continue
        for name, was, now in _figures(before[row.key], row):
            if now > was:
                lines.append(f"{row.key}: {name} {now}, committed {was}")
    return lines


def _figures(before: list[Row], row: Row) -> list[tuple[str, int, int]]:
    """Name, committed figure and new one; lower is better. Of several alike, the worst counts."""
    kinds = {kind for each in before for kind in each.matrix_instructions}
    lost = [f"{kind} instructions lost" for kind in kinds if kind not in row.matrix_instructions]
    return [
        ("registers", max(each.registers for each in before), row.registers),
        ("spilled bytes", max(each.spills for each in before), row.spills),
        ("shared bytes", max(each.shared_bytes for each in before), row.shared_bytes),
        ("serialised", max(each.serialized for each in before), row.serialized),
        *((name, 0, 1) for name in lost),
    ]
