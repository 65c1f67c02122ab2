"""What the compiler made of every kernel, as committed: predictions take occupancy from it.

``fastlora kernels --write-table`` makes the table; figures of another version of Triton are not comparable.
"""

import csv
import functools
import io
from dataclasses import dataclass
from importlib.resources import files

from fastlora_kernels.tile import Tile

FILE = "codegen.csv"
VERSION_LINE = "# triton "
_TEXT = ("kernel", "target", "dtype", "adapter_dtype", "absent", "activation", "tile")
_FLAGS = ("dropout", "aligned", "rank_aligned", "serialized")


@dataclass(frozen=True)
class Row:
    """What the compiler made of one kernel with one tile for one GPU.

    Attributes:
        kernel: Name of the kernel.
        target: The architecture, for instance ``sm_90``.
        dtype: ``bf16``, ``fp16`` or ``fp32``, of the layer.
        adapter_dtype: Dtype of A and B, or of an adapter's parameters: ``fp32`` or the layer's.
        absent: Flags of arguments that are left out of the call, with spaces between; empty where none is.
        dropout: Whether it draws or reads a dropout mask.
        aligned: Whether sizes and row strides are multiples of 16; without it none is taken for one, the rank
            included.
        rank_aligned: Whether the rank (or bottleneck) is one too.
        activation: The bottleneck's: ``gelu``, ``relu`` or ``silu``; empty where there is none.
        tile: Block sizes, as :func:`tile_text` writes them.
        warps: Warps of one program.
        stages: Stages of its pipeline.
        registers: Registers of one thread.
        spills: Bytes per thread written to memory for want of registers.
        shared_bytes: Shared memory of one program.
        matrix_instructions: Count by kind: ``wgmma``, ``tcgen05``, ``mma`` or ``mfma``.
        serialized: Whether the assembler had to serialise the ``wgmma`` pipeline.
    """

    kernel: str
    target: str
    dtype: str
    adapter_dtype: str
    absent: str
    dropout: bool
    aligned: bool
    rank_aligned: bool
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
        tile = (self.tile, self.warps, self.stages)
        flags = (self.adapter_dtype, self.absent, self.dropout, self.aligned, self.rank_aligned)
        return (self.kernel, self.target, self.dtype, self.activation, *tile, *flags)


def tile_text(tile: Tile) -> str:
    """Block sizes as a :class:`Row` has them: rows×cols×depth, rank."""
    text = f"{tile.rows}×{tile.cols}×{tile.depth}, {tile.rank}"
    return f"{text} persistent" if tile.persistent else text


@functools.cache
def committed() -> tuple[str, tuple[Row, ...]]:
    """The version of Triton that made the table, and its rows."""
    text = files("fastlora_kernels").joinpath("compile", FILE).read_text("utf-8")
    version, _, rest = text.partition("\n")
    return version.removeprefix(VERSION_LINE), tuple(map(_parsed, csv.DictReader(io.StringIO(rest))))


def _parsed(values: dict[str, str]) -> Row:
    kinds = dict(pair.split(":") for pair in values["matrix_instructions"].split())
    made: dict[str, object] = {name: values[name] for name in _TEXT}
    made |= {name: values[name] == "1" for name in _FLAGS}
    made |= {name: int(values[name]) for name in ("warps", "stages", "registers", "spills", "shared_bytes")}
    return Row(**made, matrix_instructions={kind: int(count) for kind, count in kinds.items()})  # type: ignore[arg-type]
