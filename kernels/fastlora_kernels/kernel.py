"""What is known of a kernel without compiling it: the one record that everything else reads.

Plans take its tiles, launchers and the compile gate its block sizes, the cost model its axes. Records stand
in a ``kernels.py`` beside the kernels they are of, and not in the same files, which need Triton: plans and
predictions have to work where it is not installed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fastlora_kernels.targets import Target
from fastlora_kernels.tile import TILES_PER_GROUP, Shape, Tile

Side = Literal["rows", "cols", "depth", "rank"]


def operands(tile: Tile, itemsize: int) -> tuple[int, int]:
    """Shared memory of a product: bytes of a stage, and beside the pipeline.

    Args:
        tile: Block sizes of ``rows × depth · depth × cols``.
        itemsize: Bytes of an element.
    """
    # half a tile of the output passes through shared memory of its own, beside barriers
    kept = tile.rows * tile.cols // 2 * itemsize + 1024 if tile.persistent else 0
    return (tile.rows + tile.cols) * tile.depth * itemsize, kept


# compared by identity: there is one of each
@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel.

    Attributes:
        name: What tables call it.
        function: Module in this package and name of the ``@triton.jit`` function.
        axes: The axis that each side of a tile cuts: ``{"rows": "M"}`` where ``tile.rows`` is ``BLOCK_M``.
        tiles: The pinned tiles, the smallest last, by rank (or bottleneck), dtype, GPU and whether rows are
            aligned. Compiled without spills on their architecture.
        shared: Shared memory in bytes, by tile and bytes of an element: of a pipeline stage, and beside it.
        grouped: Whether programs walk the columns in groups of row tiles.
        split: The side whose axis is cut into partial results; None where none is.
        beside: The tile of the programs that compute a second output in the same launch, by the first's tile.
        persistent: Module and name of the function that runs persistent tiles; None where there are none.
        descriptors: What each of its tensor descriptors copies at a time, by tile.
        varies: Constexprs of a call, not of a tile, of which the compile gate tries every value.
        absent: Flags that are off; all others are on when compiled, the case that needs more registers.
        optional: Flags that are off in some calls, as where arguments are absent, in groups that go together.
        decoding: Instructions of a thread for every value of the weight that its loop decodes, all else in it
            included, by tile and GPU; 0 where nothing is decoded.
        fuses: Whether a product and a sum may become one operation, rounded once.
        has_parameters: Whether it reads A, B or an adapter's parameters, whose dtype may be another than x's.
        ranks: One for every tile that differs by it, and one that 16 does not divide: what the compile gate
            asks tiles for.
    """

    name: str
    function: tuple[str, str]
    axes: Mapping[Side, str]
    tiles: Callable[[int, torch.dtype, Target, bool], Sequence[Tile]]
    shared: Callable[[Tile, int], tuple[int, int]] = operands
    grouped: bool = False
    split: Side | None = None
    beside: Callable[[Tile], Tile] | None = None
    persistent: tuple[str, str] | None = None
    descriptors: Callable[[Tile], Mapping[str, tuple[int, int]]] | None = None
    varies: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    optional: tuple[tuple[str, ...], ...] = ()
    decoding: Callable[[Tile, Target], float] = lambda *_: 0.0
    fuses: bool = True
    has_parameters: bool = True
    ranks: tuple[int, ...] = (8, 16, 32, 64)

    def size(self, shape: Shape, side: Side) -> int:
        """Length of the axis that a side of a tile cuts."""
        return shape.size(self.axes[side])

    def blocks(self, tile: Tile) -> dict[str, int]:
        """The constexprs that a tile settles, by their names in the kernel's signature."""
        values = {f"BLOCK_{axis}": getattr(tile, side) for side, axis in self.axes.items()}
        if self.beside is not None:
            other = self.beside(tile)
            values |= {f"BLOCK_{self.axes[side]}_A": getattr(other, side) for side in ("rows", "cols")}
        return values | {"GROUP": TILES_PER_GROUP} if self.grouped else values

    def options(self, tile: Tile) -> dict[str, int]:
        """What a tile and the kernel ask of the compiler."""
        options: dict[str, int] = {"num_warps": tile.warps, "num_stages": tile.stages}
        return options if self.fuses else options | {"enable_fp_fusion": False}
