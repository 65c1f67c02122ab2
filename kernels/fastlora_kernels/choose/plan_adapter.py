"""Launch plans of the bottleneck adapter's kernels: pinned tiles by architecture, nothing is timed.

One launch forward where the whole bottleneck of a row tile fits registers, else two. Backward is two launches
and the sum of the partial results.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Plan, Tile, cdiv

AdapterKernel = Literal[
    "adapter_forward", "adapter_down", "adapter_up", "adapter_grad_z", "adapter_grad_h_weights"
]

KERNELS: tuple[AdapterKernel, ...] = (
    "adapter_forward",
    "adapter_down",
    "adapter_up",
    "adapter_grad_z",
    "adapter_grad_h_weights",
)
WIDEST_ONE_LAUNCH = 64
WIDEST = 256

_STAGES = {"sm_80": 3, "sm_90": 3, "sm_100": 3, "gfx942": 2}
# for the kernel that keeps two parameters' gradients in registers: the widest chunk of the bottleneck, then
# rows, hidden columns and warps that leave it room without a spill. Wider ones are cut into the last chunk
_GRAD_BLOCKS = {
    "sm_80": ((16, 32, 64, 4), (64, 32, 64, 8), (128, 32, 32, 8)),
    "sm_90": ((16, 64, 128, 4), (64, 64, 128, 8), (128, 64, 64, 8), (256, 64, 32, 8)),
    "sm_100": ((16, 64, 128, 4), (64, 64, 128, 8), (128, 64, 64, 8), (256, 64, 32, 8)),
    "gfx942": ((16, 32, 64, 4), (64, 32, 64, 4)),
}


@functools.lru_cache(maxsize=4096)
def choose(
    kernel: AdapterKernel,
    rows: int,
    hidden: int,
    size: int,
    dtype: torch.dtype,
    target: Target,
    *,
    aligned: bool = True,
) -> Plan:
    """Tile and splits of one kernel for h ``[rows, hidden]`` and a bottleneck of ``size``. Deterministic."""
    tile = _tile(kernel, size, dtype, target, aligned)
    return Plan(tile, _splits(kernel, rows, hidden, tile, target))


def one_launch(size: int) -> bool:
    """Whether the forward pass of a bottleneck of this size runs in one launch."""
    return size <= WIDEST_ONE_LAUNCH


def tiles(
    kernel: AdapterKernel, size: int, dtype: torch.dtype, target: Target, *, aligned: bool = True
) -> Iterator[Tile]:
    """Every tile that :func:`choose` can give this kernel for a bottleneck of this size."""
    if one_launch(size) or kernel != "adapter_forward":
        yield _tile(kernel, size, dtype, target, aligned)


def _tile(kernel: AdapterKernel, size: int, dtype: torch.dtype, target: Target, aligned: bool) -> Tile:
    block_d = max(16, 1 << (size - 1).bit_length())
    # IEEE products on the ordinary units, or an address for every element: both take many registers
    small = not aligned or dtype == torch.float32 or target.tiles == "default" or size % 16 != 0
    if kernel == "adapter_grad_h_weights":
        tile = _grad_tile(block_d, dtype, target, small)
    elif small:
        tile = Tile(32, 32, depth=32, rank=block_d if kernel == "adapter_forward" else 32, warps=4, stages=2)
    elif kernel == "adapter_up":
        tile = Tile(128, 128, depth=64, rank=min(block_d, 64), warps=8, stages=_STAGES[target.tiles])
    else:
        tile = Tile(64, 64, depth=64, rank=min(block_d, 64), warps=4, stages=_STAGES[target.tiles])
    return _fitted(tile, kernel, dtype, target)


def _grad_tile(block_d: int, dtype: torch.dtype, target: Target, small: bool) -> Tile:
    if small and dtype == torch.float32:
        return Tile(32, 32, depth=32, rank=32, warps=4 if target.is_amd else 8, stages=2)
    if small:
        return Tile(32, 32, depth=32, rank=16, warps=4, stages=2)
    blocks = _GRAD_BLOCKS[target.tiles]
    chunk, rows, cols, warps = next((block for block in blocks if block_d <= block[0]), blocks[-1])
    rank, stages = min(block_d, chunk), _STAGES[target.tiles]
    return Tile(rows, cols, depth=rows, rank=rank, warps=warps, stages=stages)


def _fitted(tile: Tile, kernel: AdapterKernel, dtype: torch.dtype, target: Target) -> Tile:
    """The tile with as many pipeline stages as its operands leave room for in shared memory."""
    # parameters may come in fp32 beside a 16-bit h
    wide, narrow = 4, dtype.itemsize
    if kernel == "adapter_grad_h_weights":
        per_stage = tile.rows * (2 * tile.cols + 2 * tile.rank) * narrow
        kept = tile.cols * tile.rank * narrow
    elif kernel == "adapter_up":
        per_stage, kept = tile.rank * (tile.rows * narrow + tile.cols * wide), 0
    else:
        per_stage = tile.depth * (tile.rows * narrow + tile.rank * wide)
        kept = tile.rows * tile.rank * narrow
    return replace(tile, stages=max(1, min(tile.stages, (target.shared_bytes - kept) // per_stage)))


def _splits(kernel: AdapterKernel, rows: int, hidden: int, tile: Tile, target: Target) -> int:
    """Groups of rows, so that the card is filled about twice; each at least four steps long."""
    if kernel != "adapter_grad_h_weights":
        return 1
    wanted = cdiv(2 * target.multiprocessors, cdiv(hidden, tile.cols))
    return max(1, min(wanted, cdiv(rows, tile.rows) // 4))
