"""What the compiler made of every kernel, as committed: the regression gate compares with it.

``fastlora kernels --write-table`` makes ``codegen.csv``; a worse figure in it is a decision that a reader of
the diff can see. Figures of another version of Triton are not comparable. Predictions take occupancy from it.
"""

import csv
import functools
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlora_kernels.tile import Tile

FILE = "codegen.csv"
_VERSION_LINE = "# triton "
_TEXT = ("kernel", "target", "dtype", "activation", "tile")
_FLAGS = ("dropout", "aligned", "serialized")


@dataclass(frozen=True)
class Row:
    """What the compiler made of a :class:`~fastlora_kernels.compile.specs.Spec`.

    Attributes:
        tile: Block sizes, as :func:`tile_text` writes them.
        registers: Per thread.
        spills: Bytes per thread written to memory for want of registers.
        shared_bytes: Shared memory of one program.
        matrix_instructions: Count by kind: ``wgmma``, ``tcgen05``, ``mma`` or ``mfma``.
        serialized: Whether the assembler had to serialise the ``wgmma`` pipeline.
    """

    kernel: str
    target: str
    dtype: str
    dropout: bool
    aligned: bool
    activation: str
    tile: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    serialized: bool

    @property
    def key(self) -> tuple[str | int, ...]:
        """What was compiled, without what came of it."""
        flags = (self.dropout, self.aligned, self.activation)
        return (self.kernel, self.target, self.dtype, self.tile, self.warps, self.stages, *flags)


def tile_text(tile: "Tile") -> str:
    """Block sizes as a :class:`Row` has them: rows×cols×depth, rank."""
    text = f"{tile.rows}×{tile.cols}×{tile.depth}, {tile.rank}"
    return f"{text} persistent" if tile.persistent else text


@functools.cache
def committed() -> tuple[str, tuple[Row, ...]]:
    """The version of Triton that made the table, and its rows."""
    text = files("fastlora_kernels.compile").joinpath(FILE).read_text("utf-8")
    version, _, rest = text.partition("\n")
    return version.removeprefix(_VERSION_LINE), tuple(map(_parsed, csv.DictReader(io.StringIO(rest))))


def table_text(rows: Iterable[Row], triton_version: str) -> str:
    """The file's text for these rows."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=repr):
        kinds = " ".join(f"{kind}:{count}" for kind, count in sorted(row.matrix_instructions.items()))
        values = {**asdict(row), "matrix_instructions": kinds}
        writer.writerow(
            {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}
        )
    return f"{_VERSION_LINE}{triton_version}\n{out.getvalue()}"


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


def _parsed(values: dict[str, str]) -> Row:
    kinds = dict(pair.split(":") for pair in values["matrix_instructions"].split())
    made: dict[str, object] = {name: values[name] for name in _TEXT}
    made |= {name: values[name] == "1" for name in _FLAGS}
    made |= {name: int(values[name]) for name in ("warps", "stages", "registers", "spills", "shared_bytes")}
    return Row(**made, matrix_instructions={kind: int(count) for kind, count in kinds.items()})  # type: ignore[arg-type]
