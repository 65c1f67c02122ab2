"""The records of the bottleneck adapter's kernels: tiles, axes, shared memory. Needs no Triton.

One launch forward where the whole bottleneck of a row tile fits registers, else two. Backward is two launches
and the sum of the partial results.
"""

import torch

from fastlora_kernels.kernel import Kernel
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Tile

WIDEST_ONE_LAUNCH = 64
WIDEST = 256

_BOTTLENECKS = (8, 16, 32, 64, 128, 256)
_STAGES = {"sm_80": 3, "sm_90": 3, "sm_100": 3, "gfx942": 2}
# for the kernel that keeps two parameters' gradients in registers: the widest chunk of the bottleneck, then
# rows, hidden columns and warps that leave it room without a spill. Wider ones are cut into the last chunk
_GRAD_BLOCKS = {
    "sm_80": ((16, 32, 64, 4), (64, 32, 64, 8), (128, 32, 32, 8)),
    "sm_90": ((16, 64, 128, 8), (64, 64, 128, 8), (128, 64, 64, 8), (256, 64, 32, 8)),
    "sm_100": ((16, 64, 128, 8), (64, 64, 128, 8), (128, 64, 64, 8), (256, 64, 32, 8)),
    "gfx942": ((16, 32, 64, 4), (64, 32, 64, 4)),
}
# parameters may come in fp32 beside a 16-bit h
_WIDE = 4


def one_launch(size: int) -> bool:
    """Whether the forward pass of a bottleneck of this size runs in one launch."""
    return size <= WIDEST_ONE_LAUNCH


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _is_small(size: int, dtype: torch.dtype, target: Target, aligned: bool) -> bool:
    # IEEE products on the ordinary units, or an address for every element: both take many registers
    return not aligned or dtype == torch.float32 or target.tiles == "default" or size % 16 != 0


def _whole(size: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    if _is_small(size, dtype, target, aligned):
        return [Tile(32, 32, depth=32, rank=_block(size), warps=4, stages=2)]
    return _down(size, dtype, target, aligned)


def _down(size: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    if _is_small(size, dtype, target, aligned):
        return [Tile(32, 32, depth=32, rank=32, warps=4, stages=2)]
    return [Tile(64, 64, depth=64, rank=min(_block(size), 64), warps=4, stages=_STAGES[target.tiles])]


def _up(size: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    if _is_small(size, dtype, target, aligned):
        return _down(size, dtype, target, aligned)
    return [Tile(128, 128, depth=64, rank=min(_block(size), 64), warps=8, stages=_STAGES[target.tiles])]


def _grad_weights(size: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    small = _is_small(size, dtype, target, aligned)
    if small and dtype == torch.float32:
        # sm_100's assembler spills at 32
        chunk = 16 if target.tiles == "sm_100" else 32
        return [Tile(32, 32, depth=32, rank=chunk, warps=4 if target.is_amd else 8, stages=2)]
    if small:
        return [Tile(32, 32, depth=32, rank=16, warps=4, stages=2)]
    blocks = _GRAD_BLOCKS[target.tiles]
    chunk, rows, cols, warps = next((block for block in blocks if _block(size) <= block[0]), blocks[-1])
    return [Tile(rows, cols, rows, min(_block(size), chunk), warps, _STAGES[target.tiles])]


def _down_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    return tile.depth * (tile.rows * itemsize + tile.rank * _WIDE), tile.rows * tile.rank * itemsize


def _up_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    return tile.rank * (tile.rows * itemsize + tile.cols * _WIDE), 0


def _grad_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    return tile.rows * (2 * tile.cols + 2 * tile.rank) * itemsize, tile.cols * tile.rank * itemsize


ADAPTER_FORWARD = Kernel(
    name="adapter_forward",
    function=("adapter.forward", "_adapter_forward_kernel"),
    axes={"rows": "M", "depth": "H", "rank": "D"},
    tiles=_whole,
    shared=_down_shared,
    varies=("HAS_DROPOUT", "ACTIVATION"),
    optional=(("HAS_DOWN_BIAS", "HAS_UP_BIAS"), ("HAS_RESIDUAL",)),
    ranks=tuple(size for size in _BOTTLENECKS if one_launch(size)),
)
ADAPTER_DOWN = Kernel(
    name="adapter_down",
    function=("adapter.forward", "_adapter_down_kernel"),
    axes={"rows": "M", "depth": "H", "rank": "D"},
    tiles=_down,
    shared=_down_shared,
    varies=("HAS_DROPOUT", "ACTIVATION"),
    optional=(("HAS_DOWN_BIAS",),),
    ranks=_BOTTLENECKS,
)
ADAPTER_UP = Kernel(
    name="adapter_up",
    function=("adapter.forward", "_adapter_up_kernel"),
    axes={"rows": "M", "cols": "H", "rank": "D"},
    tiles=_up,
    shared=_up_shared,
    grouped=True,
    optional=(("HAS_UP_BIAS",), ("HAS_RESIDUAL",)),
    ranks=_BOTTLENECKS,
)
ADAPTER_GRAD_Z = Kernel(
    name="adapter_grad_z",
    function=("adapter.backward", "_adapter_grad_z_kernel"),
    axes={"rows": "M", "depth": "H", "rank": "D"},
    tiles=_down,
    shared=_down_shared,
    varies=("ACTIVATION",),
    ranks=_BOTTLENECKS,
)
ADAPTER_GRAD_H_WEIGHTS = Kernel(
    name="adapter_grad_h_weights",
    function=("adapter.backward", "_adapter_grad_h_weights_kernel"),
    axes={"rows": "M", "cols": "H", "rank": "D"},
    tiles=_grad_weights,
    shared=_grad_shared,
    split="rows",
    varies=("ONE_CHUNK",),
    optional=(("HAS_DH",), ("ADD_INPUT",)),
    ranks=_BOTTLENECKS,
)
KERNELS = (ADAPTER_FORWARD, ADAPTER_DOWN, ADAPTER_UP, ADAPTER_GRAD_Z, ADAPTER_GRAD_H_WEIGHTS)
