"""The records of the kernels that read quantised weights. Needs no Triton."""

import math
from collections.abc import Callable
from dataclasses import replace

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
# the path over a quantised weight alone, which the forward pass decodes in its loop
DECODE = "decode"
# columns that are decoded at a time: a block of a 4-bit weight that is decoded in a loop is whole steps long
DECODED_COLUMNS = 64
# its second accumulator is as wide as the rank
MOST_RANKS_DECODING = 64
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


def _few_rows(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    """For calls of few rows, where reading W and decoding it is what takes time.

    On Hopper and Blackwell too few rows for a warp group: products there take their operands from registers,
    as on older GPUs, where a tile that is decoded in registers arrives by way of shared memory.
    """
    if dtype == torch.float32:
        return [Tile(32, 32, 16, _whole_rank(rank, 32), warps=8, stages=2)]
    # wider than there are rows, or all warps compute the same S
    smallest = Tile(16, 32, DECODED_COLUMNS, _whole_rank(rank, 32), warps=4, stages=2)
    if not aligned or target.is_amd or target.tiles == "default":
        return [smallest]
    piped = replace(smallest, stages=4)
    # at higher ranks no register is left
    if target.tiles != "sm_80" or rank > 32:
        return [piped]
    return [replace(piped, rows=64, cols=64, rank=_whole_rank(rank, 16)), piped]


def _whole_rank(rank: int, least: int) -> int:
    return min(max(1 << (rank - 1).bit_length(), least), MOST_RANKS_DECODING)


def _of_bytes(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    """For any number of rows; the smallest where reading W takes the time, in programs enough for all cores.

    With many rows in a tile a value is decoded seldom, unless products take W from registers: then every warp
    of other rows decodes it anew.
    """
    if dtype == torch.float32:
        return [Tile(32, 32, 16, 16, warps=4, stages=2)]
    if not aligned or target.tiles == "default":
        return [Tile(32, 32, 32, 16, warps=4, stages=2)]
    # rows of S that are no multiple of 16 long can't be read in wide words
    ranks = 16 if rank % 16 else min(1 << (rank - 1).bit_length(), 32)
    sizes = [(128, 128, 64, 8), (64, 64, 64, 4), (16, 32, 128, 4)]
    found = [Tile(rows, cols, depth, ranks, warps, stages=4) for rows, cols, depth, warps in sizes]
    # elsewhere it spills
    return [Tile(256, 128, 64, ranks, warps=8, stages=3), *found] if target.tiles == "sm_90" else found


def _of_bytes_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    """x and codes wait in the pipeline, one tile of values lies beside it."""
    return (tile.rows * itemsize + tile.cols) * tile.depth, tile.cols * tile.depth * itemsize


def _of_bytes_instructions(tile: Tile, target: Target) -> float:
    """As counted in the machine code for sm_80 and sm_90 of e4m3fn; int8, with fewer, is charged as many."""
    decoded_once = tile.rows == 16 or target.tiles in ("sm_90", "sm_100")
    return 10.0 if decoded_once else 23.0


def _decoded_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    """x, A and packed codes wait in the pipeline, one decoded tile lies beside it."""
    stage = (tile.rows * itemsize + tile.rank * 4) * tile.depth + tile.cols * tile.depth // 2
    return stage, tile.cols * tile.depth * itemsize


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
LORA_FORWARD_4BIT = Kernel(
    name="lora_forward_4bit",
    function=("quant.forward", "_lora_forward_4bit_kernel"),
    axes={"rows": "M", "cols": "N", "depth": "K", "rank": "R"},
    tiles=_few_rows,
    shared=_decoded_shared,
    grouped=True,
    optional=(("HAS_NESTED",), ("HAS_BIAS",)),
    # as counted in the PTX for sm_80 and sm_90
    decoding=lambda *_: 16.0,
    # the decoded weight is dequantise_4bit's to the bit
    fuses=False,
)
LORA_FORWARD_8BIT = Kernel(
    name="lora_forward_8bit",
    function=("quant.forward", "_lora_forward_8bit_kernel"),
    axes={"rows": "M", "cols": "N", "depth": "K", "rank": "R"},
    tiles=_of_bytes,
    shared=_of_bytes_shared,
    grouped=True,
    optional=(("IS_FLOAT",), ("HAS_BIAS",)),
    decoding=_of_bytes_instructions,
)
KERNELS = (DEQUANTISE_4BIT, DEQUANTISE_8BIT, LORA_FORWARD_4BIT, LORA_FORWARD_8BIT)
# by how a weight is stored, what decodes it in its loop
DECODING = {"nf4": LORA_FORWARD_4BIT, "int8": LORA_FORWARD_8BIT, "fp8-rows": LORA_FORWARD_8BIT}
