"""The records of the kernels of layers that share their input. Needs no Triton."""

from dataclasses import replace

import torch

from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora.kernels import LORA_DOWN, LORA_GRAD_X
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Tile

# layers of a launch
MOST_LAYERS = 3


def _tiles(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    # 32 ranks at a time, or 16 that can't be read in wide words: zeros cost little beside several main loops
    large = LORA_GRAD_X.tiles(rank if rank % 16 else 32, dtype, target, aligned)
    # wider ones spill beneath several masks
    largest, *_, smallest = (tile for tile in large if tile.rows == tile.cols)
    if aligned and dtype != torch.float32:
        # without dropout three stages leave room for two programs on a multiprocessor
        return [replace(largest, stages=min(largest.stages, 3))]
    # plans leave these to the library; a depth of 32 spills on sm_100
    return [replace(smallest, depth=16)]


def _down_tiles(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    # as for a layer alone, with an A and an accumulator for each: beyond these ranks they spill
    most = 16 if target.name in ("sm_120", "sm_121") else 32
    (tile,) = LORA_DOWN.tiles(rank if rank % 16 else min(rank, most), dtype, target, aligned)
    # in float32 four warps spill there, too
    warps = 8 if dtype == torch.float32 and target.tiles == "sm_100" else tile.warps
    return [replace(tile, depth=min(tile.depth, 64), warps=warps)]


def _down_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    # every A may come in fp32 beside a 16-bit x, and x passes through shared memory once more to be masked
    return (2 * tile.rows * itemsize + MOST_LAYERS * tile.cols * 4) * tile.depth, 0


SHARED_DOWN = Kernel(
    name="shared_down",
    function=("shared.down", "_shared_down_kernel"),
    axes=LORA_DOWN.axes,
    tiles=_down_tiles,
    shared=_down_shared,
    split="depth",
    varies=("HAS_DROPOUT",),
    optional=(("HAS_THIRD",),),
    ranks=(8, 16, 32),
)
SHARED_GRAD_X = Kernel(
    name="shared_grad_x",
    function=("shared.grad_x", "_shared_grad_x_kernel"),
    axes=LORA_GRAD_X.axes,
    tiles=_tiles,
    grouped=True,
    varies=("HAS_DROPOUT",),
    optional=(("HAS_THIRD",),),
    ranks=(8, 32),
)
KERNELS = (SHARED_DOWN, SHARED_GRAD_X)
