"""Which path and tile a shape gets on a GPU. Nothing is timed: the same answer on every run and every rank.

Tiles are pinned per architecture, largest first; the plan takes the first that fills the card and shrinks its
pipeline until it fits shared memory. ``codegen`` compiles every tile that can come out of here.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from fastlora_kernels.targets import Target

Kernel = Literal[
    "lora_down",
    "lora_forward",
    "lora_grad_s_b",
    "lora_grad_x",
    "lora_grad_a",
    "dora_forward",
    "dora_weight_norm",
    "dora_grad_product",
]
Path = Literal["split", "library"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
FEWEST_ROWS = 32
# up to this rank the fp32 partial sums of dS take less traffic than a second read of dY
MOST_RANKS_PER_READ = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer call: x ``[m, k]``, weight ``[n, k]``, rank r.

    ``aligned`` says that n, k, the row strides and the addresses are multiples of 16, so that rows can be
    read in wide words. Without it every element has an address of its own: large tiles run out of registers.
    """

    m: int
    n: int
    k: int
    r: int
    aligned: bool = True


@dataclass(frozen=True)
class Tile:
    """Block sizes of one program: output rows × cols, the step of the reduction, and ranks at a time."""

    rows: int
    cols: int
    depth: int
    rank: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The choice for one kernel: ``path`` "split" runs it, "library" leaves the whole op to library products.

    ``splits`` is into how many parts the reduction over a long axis is cut; their fp32 partial results are
    summed in a second, deterministic step.
    """

    path: Path
    tile: Tile
    splits: int = 1


# rows, cols, depth, warps, stages; rank is filled in. Compiled without spills on their architecture.
_LARGE_TILES = {
    "sm_80": ((128, 128, 64, 8, 4), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3)),
    "sm_90": ((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    "sm_100": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    "gfx942": ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2), (64, 64, 64, 4, 2)),
    "default": ((64, 64, 32, 4, 2), (32, 32, 32, 4, 2)),
}
# fp32 products run on the ordinary units in IEEE precision, with small tiles
_LARGE_TILES_FP32 = ((64, 64, 16, 4, 2), (32, 32, 32, 4, 2))
_LARGE = ("lora_forward", "lora_grad_x", "dora_forward")
# bound by their one read, with small products or none: the same everywhere
_DORA_TILES = {
    "dora_weight_norm": Tile(rows=32, cols=64, depth=1, rank=16, warps=4, stages=2),
    "dora_grad_product": Tile(rows=16, cols=128, depth=1, rank=1, warps=4, stages=1),
}
_SKINNY_STAGES = {"sm_80": 3, "sm_90": 3, "sm_100": 3, "gfx942": 2}


@functools.lru_cache(maxsize=4096)
def choose(kernel: Kernel, shape: Shape, dtype: torch.dtype, target: Target) -> Plan:
    """Path, tile and splits for one kernel of a layer call. Deterministic; never raises on an unknown GPU."""
    tile = _fitted(_choose_tile(kernel, shape, dtype, target), kernel, dtype, target)
    return Plan(choose_path(shape, dtype, target), tile, _choose_splits(kernel, shape, tile, target))


def choose_path(shape: Shape, dtype: torch.dtype, target: Target) -> Path:
    """Whether a layer call runs the kernels or is left to library products. Predicted, not measured.

    Left to the library: fp32 (IEEE), which has no tensor cores; unaligned rows and ranks above 16 that are no
    multiple of it, which have no wide loads; so few rows that launches dominate; GPUs without pinned tiles.
    """
    kernels_pay = (
        dtype != torch.float32
        and target.tiles != "default"
        and shape.aligned
        and (shape.r <= 16 or shape.r % 16 == 0)
        and shape.m >= FEWEST_ROWS
    )
    return "split" if kernels_pay else "library"


def tiles(
    kernel: Kernel, rank: int, dtype: torch.dtype, target: Target, *, aligned: bool = True
) -> Iterator[Tile]:
    """Every tile that :func:`choose` can give this kernel at a rank."""
    for tile in _candidates(kernel, rank, dtype, _table(target, aligned)):
        yield _fitted(tile, kernel, dtype, target)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _choose_tile(kernel: Kernel, shape: Shape, dtype: torch.dtype, target: Target) -> Tile:
    *larger, smallest = _candidates(kernel, shape.r, dtype, _table(target, shape.aligned))
    rows, cols = _output_size(kernel, shape)
    for tile in larger:
        if cdiv(rows, tile.rows) * cdiv(cols, tile.cols) >= target.multiprocessors:
            return tile
    return smallest


def _table(target: Target, aligned: bool) -> str:
    return target.tiles if aligned else "default"


def _candidates(kernel: Kernel, rank: int, dtype: torch.dtype, table: str) -> Iterable[Tile]:
    if kernel in _LARGE:
        large = _LARGE_TILES_FP32 if dtype == torch.float32 else _LARGE_TILES[table]
        if kernel == "dora_forward":
            # its epilogue stores twice, which spills where the accumulator takes most of the registers
            large = tuple(tile for tile in large if tile[1] <= 128)
        chunk = 16 if dtype == torch.float32 else _ranks_at_a_time(rank, 32)
        return [Tile(rows, cols, depth, chunk, warps, stages) for rows, cols, depth, warps, stages in large]
    if kernel in _DORA_TILES:
        return [_DORA_TILES[kernel]]
    return [_skinny_tile(kernel, rank, dtype, table)]


def _skinny_tile(kernel: Kernel, rank: int, dtype: torch.dtype, table: str) -> Tile:
    """Tile of a kernel whose output is only as wide as the rank: bound by the one read of its large input."""
    if table == "default" or dtype == torch.float32:
        return Tile(rows=32, cols=32, depth=32, rank=16, warps=4, stages=2)
    # a higher rank reads the large input once per 64
    block_rank = _ranks_at_a_time(rank, 64)
    stages = _SKINNY_STAGES[table]
    if kernel == "lora_down":
        return Tile(rows=64, cols=block_rank, depth=128, rank=block_rank, warps=4, stages=stages)
    return Tile(
        rows=64, cols=128, depth=64, rank=block_rank, warps=8 if block_rank == 64 else 4, stages=stages
    )


def _ranks_at_a_time(rank: int, most: int) -> int:
    # rows of S that are no multiple of 16 long can't be read in wide words either
    return 16 if rank % 16 else min(1 << (rank - 1).bit_length(), most)


def _fitted(tile: Tile, kernel: Kernel, dtype: torch.dtype, target: Target) -> Tile:
    """The tile with as many pipeline stages as its operands leave room for in shared memory."""
    bytes_per_stage = (tile.rows + tile.cols) * tile.depth * dtype.itemsize
    if kernel == "lora_down":
        # A may come in fp32 beside a 16-bit x, and x passes through shared memory once more to be masked
        bytes_per_stage = (2 * tile.rows * dtype.itemsize + tile.cols * 4) * tile.depth
    if kernel in ("lora_grad_s_b", "lora_grad_a"):
        bytes_per_stage = tile.rows * (tile.cols + tile.rank) * dtype.itemsize
    return replace(tile, stages=max(1, min(tile.stages, target.shared_bytes // bytes_per_stage)))


def _output_size(kernel: Kernel, shape: Shape) -> tuple[int, int]:
    return shape.m, shape.k if kernel == "lora_grad_x" else shape.n


def _choose_splits(kernel: Kernel, shape: Shape, tile: Tile, target: Target) -> int:
    """Parts of the reduction, so that the card is filled about twice; each part at least four steps long."""
    if kernel == "lora_down":
        programs, steps = cdiv(shape.m, tile.rows), cdiv(shape.k, tile.depth)
        if 2 * programs >= target.multiprocessors:
            return 1
    elif kernel in ("lora_grad_s_b", "lora_grad_a", "dora_grad_product"):
        width = shape.k if kernel == "lora_grad_a" else shape.n
        programs, steps = cdiv(width, tile.cols), cdiv(shape.m, tile.rows)
    else:
        return 1
    wanted = cdiv(2 * target.multiprocessors, max(programs, 1))
    return max(1, min(wanted, steps // 4))
