"""Which tile a kernel gets for a shape on a GPU. Nothing is timed: every run and every rank gets the same.

Tiles are pinned per architecture by the kernels' records, their pipelines shrunk until they fit shared
memory; the plan takes the one with the lowest predicted time. ``compile`` compiles every tile that can come
out of here; ``paths`` decides which kernels a call runs at all.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from fastlora_kernels.adapter import kernels as adapter
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora import kernels as lora
from fastlora_kernels.predict.launches import kernel_product
from fastlora_kernels.predict.occupancy import programs_at_once
from fastlora_kernels.quant import kernels as quant
from fastlora_kernels.shared import kernels as shared
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import TILES_PER_GROUP, Plan, Shape, Tile, cdiv

KERNELS: tuple[Kernel, ...] = (*lora.KERNELS, *adapter.KERNELS, *quant.KERNELS, *shared.KERNELS)


@functools.lru_cache(maxsize=8192)
def choose(
    kernel: Kernel, shape: Shape, dtype: torch.dtype, target: Target, *, tile: Tile | None = None
) -> Plan:
    """Tile and splits for one kernel of a layer call. Deterministic; never raises on an unknown GPU.

    Args:
        kernel: Record of the kernel.
        shape: Sizes of the call.
        dtype: The dtype of x.
        target: The GPU.
        tile: One that was measured to be the fastest; without it, the one predicted to be. It was measured
            with other rows, and is left where those of this call are too many for it.
    """
    if tile is None or _overflows(tile, shape, dtype):
        tile = _fastest(kernel, shape, dtype, target)
    return Plan(tile, _splits(kernel, shape, tile, target))


def tiles(
    kernel: Kernel, rank: int, dtype: torch.dtype, target: Target, *, aligned: bool = True
) -> Iterator[Tile]:
    """Every tile that :func:`choose` can give a kernel, the smallest last.

    Args:
        kernel: Record of the kernel.
        rank: Rank of the LoRA update, or an adapter's bottleneck.
        dtype: The dtype of x.
        target: The GPU.
        aligned: Whether rows can be read in wide words, as in :class:`~fastlora_kernels.tile.Shape`.
    """
    for tile in kernel.tiles(rank, dtype, target, aligned):
        # as many pipeline stages as the operands leave room for in shared memory
        per_stage, kept = kernel.shared(tile, dtype.itemsize)
        yield replace(tile, stages=max(1, min(tile.stages, (target.shared_bytes - kept) // per_stage)))


def _fastest(kernel: Kernel, shape: Shape, dtype: torch.dtype, target: Target) -> Tile:
    """The fastest by prediction; where shapes are empty or nothing is known of the GPU, the smallest."""
    *others, smallest = tiles(kernel, shape.r, dtype, target, aligned=shape.aligned)
    if not others or 0 in (shape.m, shape.n, shape.k) or target.tiles == "default":
        return smallest

    def predicted_us(tile: Tile) -> float:
        # with dropout a kernel takes more registers, and its tile has to be the same
        at_once = programs_at_once(kernel.name, tile, dtype, target, dropping=True)
        sizes = (kernel.size(shape, "rows"), kernel.size(shape, "cols"), kernel.size(shape, "depth"))
        return kernel_product(
            kernel.name, *sizes, dtype.itemsize, tile, target,
            group=TILES_PER_GROUP, at_once=at_once, low_rank=shape.r, decoding=kernel.decoding(tile, target),
        ).microseconds  # fmt: skip

    fitting = [tile for tile in others if not _overflows(tile, shape, dtype)]
    return min((*fitting, smallest), key=predicted_us)


def _overflows(tile: Tile, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether a tile reads through a tensor descriptor of 2 GiB or more.

    Triton 3.7 and 3.8 count its bytes in 32 bits, and pack it like that of a very small tensor.
    """
    m, n, k = shape.m, shape.n, shape.k
    return tile.persistent and max(m * n, m * k, n * k) * dtype.itemsize >= 2**31


def _splits(kernel: Kernel, shape: Shape, tile: Tile, target: Target) -> int:
    """Parts of the reduction, so that the card is filled about twice; each part at least four steps long."""
    if kernel.split is None:
        return 1
    part = tile if kernel.beside is None else kernel.beside(tile)
    if kernel.split == "depth":
        programs = cdiv(kernel.size(shape, "rows"), part.rows)
        steps = cdiv(kernel.size(shape, "depth"), part.depth)
        # one part needs no second step
        if 2 * programs >= target.multiprocessors:
            return 1
    else:
        programs = cdiv(kernel.size(shape, "cols"), part.cols)
        steps = cdiv(kernel.size(shape, "rows"), part.rows)
    wanted = cdiv(2 * target.multiprocessors, max(programs, 1))
    return max(1, min(wanted, steps // 4))
