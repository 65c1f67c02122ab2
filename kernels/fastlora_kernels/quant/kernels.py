"""The records of the kernels that make quantised weights dense. Needs no Triton."""

import math
from collections.abc import Callable

import torch

from fastlora_kernels.kernel import Kernel
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Tile

# elements that share what no block of a 4-bit weight is shorter than: one span has one factor
SPAN = 32
# columns at whose multiples a block of an 8-bit weight may end
SCALED_COLUMNS = 128

# a kernel counts in 32 bits, to the end of its last tile
MOST_ELEMENTS = 2**31 - 2**16
# bounds a weight's dense rows, which live while they are multiplied
WORKSPACE_BYTES = 64 * 2**20
_TILE_ROWS = 128


def most_rows(columns: int, itemsize: int, step: int = 1) -> int:
    """Rows of a weight whose dense form fits the workspace: whole tiles where so many fit, else whole steps.

    Args:
        columns: How many the weight has.
        itemsize: Bytes of a dense element.
        step: Rows at whose multiples a part may begin.
    """
    fitting = WORKSPACE_BYTES // max(1, columns * itemsize)
    # columns of y that begin elsewhere can't be written in wide words
    tiles = math.lcm(step, _TILE_ROWS)
    return fitting // tiles * tiles or max(fitting // step, 1) * step


def _streaming(rows: int, cols: int) -> Callable[[int, torch.dtype, Target, bool], list[Tile]]:
    """The same tile on every GPU: bound by memory, with four wide stores in each thread."""

    def tiles(_rank: int, dtype: torch.dtype, _target: Target, aligned: bool) -> list[Tile]:
        # otherwise every element has an address of its own
        fewer = 1 if aligned else 4
        return [Tile(rows * 2 // dtype.itemsize // fewer, cols, depth=1, rank=1, warps=4, stages=1)]

    return tiles


DEQUANTISE_4BIT = Kernel(
    name="dequantise_4bit",
    function=("quant.dequantise", "_dequantise_4bit_kernel"),
    axes={"rows": "SPANS"},
    tiles=_streaming(128, SPAN),
    shared=lambda *_: (1, 0),
    optional=(("HAS_NESTED",),),
    has_parameters=False,
    ranks=(1,),
    fuses=False,
)
DEQUANTISE_8BIT = Kernel(
    name="dequantise_8bit",
    function=("quant.dequantise", "_dequantise_8bit_kernel"),
    axes={"rows": "N", "cols": "K"},
    tiles=_streaming(32, SCALED_COLUMNS),
    shared=lambda *_: (1, 0),
    optional=(("IS_FLOAT",),),
    has_parameters=False,
    ranks=(1,),
    fuses=False,
)
KERNELS = (DEQUANTISE_4BIT, DEQUANTISE_8BIT)
