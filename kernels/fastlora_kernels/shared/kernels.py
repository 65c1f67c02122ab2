"""The record of the kernel of layers that share their input. Needs no Triton."""

from dataclasses import replace

import torch

from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora.kernels import LORA_GRAD_X
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
KERNELS = (SHARED_GRAD_X,)
