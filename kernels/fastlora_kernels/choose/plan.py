"""Which tile a kernel gets for a shape on a GPU. Nothing is timed: every run and every rank gets the same.

Tiles are pinned per architecture, their pipelines shrunk until they fit shared memory; the plan takes the one
with the lowest predicted time. ``codegen`` compiles every tile that can come out of here; ``paths`` decides
which kernels a call runs at all.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch

from fastlora_kernels.predict.launches import kernel_product
from fastlora_kernels.predict.occupancy import programs_at_once
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import TILES_PER_GROUP, Plan, Shape, Tile, cdiv

Kernel = Literal[
    "lora_down",
    "lora_forward",
    "lora_forward_single",
    "lora_add",
    "lora_grad_s_b",
    "lora_grad_x",
    "lora_grad_a",
    "lora_grad_x_a",
    "dora_forward",
    "dora_weight_norm",
    "dora_grad_product",
]
Path = Literal["split", "single", "epilogue", "library"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
# up to this rank the fp32 partial sums of dS take less traffic than a second read of dY
MOST_RANKS_PER_READ = 32
# the single launch has a second accumulator as wide as the rank
MOST_RANKS_IN_ONE_LAUNCH = 64


# rows, cols, depth, warps, stages; rank is filled in. Compiled without spills on their architecture.
_LARGE_TILES = {
    "sm_80": ((128, 128, 64, 8, 4), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3)),
    "sm_90": ((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    "sm_100": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    "gfx942": ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2), (64, 64, 64, 4, 2)),
    "default": ((64, 64, 32, 4, 2), (32, 32, 32, 4, 2)),
}
# read through tensor descriptors, in 16-bit dtypes and where rows are aligned
_PERSISTENT_TILES = dict.fromkeys(("sm_90", "sm_100"), ((128, 256, 64, 8, 4), (128, 128, 64, 8, 4)))
_PERSISTENT: tuple[Kernel, ...] = ("lora_forward", "lora_grad_x_a")
# fp32 products run on the ordinary units in IEEE precision, with small tiles
_LARGE_TILES_FP32 = ((64, 64, 16, 4, 2), (32, 32, 32, 4, 2))
_SINGLE_TILES_FP32 = ((32, 32, 16, 8, 2),)
# what they sum over is N, not K
GRAD_X: tuple[Kernel, ...] = ("lora_grad_x", "lora_grad_x_a")
LARGE: tuple[Kernel, ...] = (
    "lora_forward", "lora_forward_single", "lora_grad_x", "lora_grad_x_a", "dora_forward",
)  # fmt: skip
# bound by their one read, with small products or none: the same everywhere
_DORA_TILES = {
    "dora_weight_norm": Tile(rows=32, cols=64, depth=1, rank=16, warps=4, stages=2),
    "dora_grad_product": Tile(rows=16, cols=128, depth=1, rank=1, warps=4, stages=1),
}
_SKINNY_STAGES = {"sm_80": 3, "sm_90": 3, "sm_100": 3, "gfx942": 2}


@functools.lru_cache(maxsize=4096)
def choose(
    kernel: Kernel, shape: Shape, dtype: torch.dtype, target: Target, *, tile: Tile | None = None
) -> Plan:
    """Tile and splits for one kernel of a layer call. Deterministic; never raises on an unknown GPU.

    Args:
        kernel: Its name.
        shape: Of the call.
        dtype: Of x.
        target: The GPU.
        tile: One that was measured to be the fastest; without it, the one predicted to be.
    """
    if tile is None:
        tile = _fitted(_choose_tile(kernel, shape, dtype, target), kernel, dtype, target)
    return Plan(tile, _choose_splits(kernel, shape, tile, target))


def tiles(
    kernel: Kernel, rank: int, dtype: torch.dtype, target: Target, *, aligned: bool = True
) -> Iterator[Tile]:
    """Every tile that :func:`choose` can give this kernel at a rank."""
    for tile in _candidates(kernel, rank, dtype, _table(target, aligned)):
        yield _fitted(tile, kernel, dtype, target)


def grad_a_part(tile: Tile) -> Tile:
    """The tile of dA's programs in a launch that computes dX with ``tile``: the same warps and stages."""
    # few rows at a time where registers are scarce: in a persistent program at higher ranks, and in the
    # smallest tile, where every element has an address of its own
    rows = 1024 // tile.rank if tile.persistent else tile.depth if tile.rows > 32 else 16
    return replace(tile, rows=rows, cols=min(tile.cols, 128))


def _choose_tile(kernel: Kernel, shape: Shape, dtype: torch.dtype, target: Target) -> Tile:
    """The fastest by prediction; where shapes are empty or nothing is known of the GPU, the smallest."""
    *others, smallest = _candidates(kernel, shape.r, dtype, _table(target, shape.aligned))
    rows, cols = _output_size(kernel, shape)
    if not others or 0 in (rows, cols, shape.n, shape.k) or target.tiles == "default":
        return smallest
    depth = shape.n if kernel in GRAD_X else shape.k
    fitting = (_fitted(tile, kernel, dtype, target) for tile in (*others, smallest))
    return min(
        fitting, key=lambda tile: _predicted_us(kernel, rows, cols, depth, shape.r, dtype, tile, target)
    )


def _predicted_us(
    kernel: Kernel,
    rows: int,
    cols: int,
    depth: int,
    rank: int,
    dtype: torch.dtype,
    tile: Tile,
    target: Target,
) -> float:
    launch = kernel_product(
        kernel,
        rows,
        cols,
        depth,
        dtype.itemsize,
        tile,
        target,
        group=TILES_PER_GROUP,
        # with dropout a kernel takes more registers, and its tile has to be the same
        at_once=programs_at_once(kernel, tile, dtype, target, dropping=True),
        low_rank=rank,
    )
    return launch.microseconds


def _table(target: Target, aligned: bool) -> str:
    return target.tiles if aligned else "default"


def _candidates(kernel: Kernel, rank: int, dtype: torch.dtype, table: str) -> Iterable[Tile]:
    if kernel in LARGE:
        large = _LARGE_TILES_FP32 if dtype == torch.float32 else _LARGE_TILES[table]
        if kernel == "dora_forward":
            # its epilogue stores twice, which spills where the accumulator takes most of the registers
            large = tuple(tile for tile in large if tile[1] <= 128)
        chunk = 16 if dtype == torch.float32 else _ranks_at_a_time(rank, 32)
        if kernel == "lora_forward_single":
            # the whole rank in a second accumulator: where registers are short, the smallest tile alone
            chunk = min(max(1 << (rank - 1).bit_length(), 16), MOST_RANKS_IN_ONE_LAUNCH)
            large = (
                _SINGLE_TILES_FP32 if dtype == torch.float32 else large[-1:] if table == "default" else large
            )
        *larger, smallest = (
            Tile(rows, cols, depth, chunk, warps, stages) for rows, cols, depth, warps, stages in large
        )
        return [*larger, *_persistent_tiles(kernel, chunk, dtype, table), smallest]
    if kernel in _DORA_TILES:
        return [_DORA_TILES[kernel]]
    return [_skinny_tile(kernel, rank, dtype, table)]


def _persistent_tiles(kernel: Kernel, chunk: int, dtype: torch.dtype, table: str) -> Iterator[Tile]:
    if kernel in _PERSISTENT and dtype != torch.float32:
        for rows, cols, depth, warps, stages in _PERSISTENT_TILES.get(table, ()):
            yield Tile(rows, cols, depth, chunk, warps, stages, persistent=True)


def _skinny_tile(kernel: Kernel, rank: int, dtype: torch.dtype, table: str) -> Tile:
    """Tile of a kernel whose output is only as wide as the rank: bound by the one read of its large input."""
    if table == "default" or dtype == torch.float32:
        return Tile(rows=32, cols=32, depth=32, rank=16, warps=4, stages=2)
    # a higher rank reads the large input once per 64
    block_rank = _ranks_at_a_time(rank, 64)
    stages = _SKINNY_STAGES[table]
    if kernel == "lora_down":
        return Tile(rows=64, cols=block_rank, depth=128, rank=block_rank, warps=4, stages=stages)
    if kernel == "lora_add":
        return Tile(rows=64, cols=128, depth=1, rank=block_rank, warps=8, stages=2)
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
    if kernel == "lora_forward_single":
        bytes_per_stage += tile.rank * tile.depth * 4
    if kernel in ("lora_grad_s_b", "lora_grad_a"):
        bytes_per_stage = tile.rows * (tile.cols + tile.rank) * dtype.itemsize
    # half a tile of the output passes through shared memory of its own, beside barriers
    kept = tile.rows * tile.cols // 2 * dtype.itemsize + 1024 if tile.persistent else 0
    return replace(tile, stages=max(1, min(tile.stages, (target.shared_bytes - kept) // bytes_per_stage)))


def _output_size(kernel: Kernel, shape: Shape) -> tuple[int, int]:
    return shape.m, shape.k if kernel in GRAD_X else shape.n


def _choose_splits(kernel: Kernel, shape: Shape, tile: Tile, target: Target) -> int:
    """Parts of the reduction, so that the card is filled about twice; each part at least four steps long."""
    if kernel == "lora_down":
        programs, steps = cdiv(shape.m, tile.rows), cdiv(shape.k, tile.depth)
        if 2 * programs >= target.multiprocessors:
            return 1
    elif kernel in ("lora_grad_s_b", "lora_grad_a", "dora_grad_product"):
        width = shape.k if kernel == "lora_grad_a" else shape.n
        programs, steps = cdiv(width, tile.cols), cdiv(shape.m, tile.rows)
    elif kernel == "lora_grad_x_a":
        part = grad_a_part(tile)
        programs, steps = cdiv(shape.k, part.cols), cdiv(shape.m, part.rows)
    else:
        return 1
    wanted = cdiv(2 * target.multiprocessors, max(programs, 1))
    return max(1, min(wanted, steps // 4))
