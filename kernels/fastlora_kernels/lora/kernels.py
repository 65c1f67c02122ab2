"""The records of the LoRA kernels, DoRA's among them: tiles, axes, shared memory. Needs no Triton."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastlora_kernels.kernel import Kernel, operands
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Tile

# up to this rank the fp32 partial sums of dS take less traffic than a second read of dY
MOST_RANKS_PER_READ = 32
# the single launch has a second accumulator as wide as the rank
MOST_RANKS_IN_ONE_LAUNCH = 64

# rows, cols, depth, warps, stages; rank is filled in
_Sizes = tuple[int, int, int, int, int]
_LARGE: dict[str, tuple[_Sizes, ...]] = {
    "sm_80": ((128, 128, 64, 8, 4), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3)),
    "sm_90": ((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    "sm_100": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    "gfx942": ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2), (64, 64, 64, 4, 2)),
    "default": ((64, 64, 32, 4, 2), (32, 32, 32, 4, 2)),
}
# read through tensor descriptors, in 16-bit dtypes and where rows are aligned
_PERSISTENT = dict.fromkeys(("sm_90", "sm_100"), ((128, 256, 64, 8, 4), (128, 128, 64, 8, 4)))
# fp32 products run on the ordinary units in IEEE precision, with small tiles
_LARGE_FP32: tuple[_Sizes, ...] = ((64, 64, 16, 4, 2), (32, 32, 32, 4, 2))
_SINGLE_FP32: tuple[_Sizes, ...] = ((32, 32, 16, 8, 2),)
_SMALL = Tile(rows=32, cols=32, depth=32, rank=16, warps=4, stages=2)
_SKINNY_STAGES = {"sm_80": 3, "sm_90": 3, "sm_100": 3, "gfx942": 2}


def grad_a_part(tile: Tile) -> Tile:
    """The tile of dA's programs in a launch that computes dX with ``tile``: the same warps and stages."""
    # few rows at a time where registers are scarce: in a persistent program at higher ranks, and in the
    # smallest tile, where every element has an address of its own
    rows = 1024 // tile.rank if tile.persistent else tile.depth if tile.rows > 32 else 16
    return replace(tile, rows=rows, cols=min(tile.cols, 128))


def _table(target: Target, aligned: bool) -> str:
    return target.tiles if aligned else "default"


def _ranks_at_a_time(rank: int, most: int) -> int:
    # rows of S that are no multiple of 16 long can't be read in wide words either
    return 16 if rank % 16 else min(1 << (rank - 1).bit_length(), most)


def _large_sizes(dtype: torch.dtype, target: Target, aligned: bool) -> tuple[_Sizes, ...]:
    return _LARGE_FP32 if dtype == torch.float32 else _LARGE[_table(target, aligned)]


def _with_rank(sizes: Sequence[_Sizes], rank: int, *, persistent: bool = False) -> list[Tile]:
    return [
        Tile(rows, cols, depth, rank, warps, stages, persistent) for rows, cols, depth, warps, stages in sizes
    ]


def _large(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    chunk = 16 if dtype == torch.float32 else _ranks_at_a_time(rank, 32)
    return _with_rank(_large_sizes(dtype, target, aligned), chunk)


def _large_or_persistent(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    *larger, smallest = _large(rank, dtype, target, aligned)
    sizes = () if dtype == torch.float32 else _PERSISTENT.get(_table(target, aligned), ())
    return [*larger, *_with_rank(sizes, smallest.rank, persistent=True), smallest]


def _grad_x_a(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    tiles = _large_or_persistent(rank, dtype, target, aligned)
    if _table(target, aligned) == "sm_100" and rank % 16:
        # its assembler keeps the smaller persistent tile to 128 registers, and spills with dropout
        return [tile for tile in tiles if not tile.persistent or tile.cols == 256]
    return tiles


def _large_storing_twice(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    # the epilogue spills where the accumulator takes most of the registers
    return [tile for tile in _large(rank, dtype, target, aligned) if tile.cols <= 128]


def _single(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    """The whole rank in a second accumulator: where registers are short, the smallest tile alone."""
    sizes = _large_sizes(dtype, target, aligned)
    if dtype == torch.float32:
        sizes = _SINGLE_FP32
    elif _table(target, aligned) == "default":
        sizes = sizes[-1:]
    elif target.name in ("sm_120", "sm_121"):
        # its assembler keeps four warps to 128 registers, and the smallest tile in three stages, and spills
        *larger, smallest = ((*size[:3], 8, size[4]) for size in sizes)
        sizes = (*larger, (*smallest[:4], 2))
    return _with_rank(sizes, min(max(1 << (rank - 1).bit_length(), 16), MOST_RANKS_IN_ONE_LAUNCH))


def _skinny(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    """For an output only as wide as the rank: bound by the one read of the large input."""
    table = _table(target, aligned)
    if table == "default" or dtype == torch.float32:
        return [_SMALL]
    # a higher rank reads the large input once per 64
    ranks = _ranks_at_a_time(rank, 64)
    warps = 8 if ranks == 64 else 4
    return [Tile(rows=64, cols=128, depth=64, rank=ranks, warps=warps, stages=_SKINNY_STAGES[table])]


def _down(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    (tile,) = _skinny(rank, dtype, target, aligned)
    # Hopper's products of a masked x with 16 columns in 16 bits wait for each other, those with 32 do not;
    # where 16 does not divide the rank they do at any width
    widened = _table(target, aligned) == "sm_90" and rank % 16 == 0
    ranks = max(tile.rank, 32) if widened else tile.rank
    return [tile if tile == _SMALL else replace(tile, cols=ranks, depth=128, rank=ranks, warps=4)]


def _grad_s_b(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    # higher ranks are left to library products
    (tile,) = _skinny(min(rank, MOST_RANKS_PER_READ), dtype, target, aligned)
    # AMD turns a tile in registers, and dY is wanted both ways
    return [replace(tile, rows=32) if target.is_amd else tile]


def _add(rank: int, dtype: torch.dtype, target: Target, aligned: bool) -> list[Tile]:
    (tile,) = _skinny(rank, dtype, target, aligned)
    return [tile if tile == _SMALL else replace(tile, depth=1, warps=8, stages=2)]


def _down_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    # A may come in fp32 beside a 16-bit x, and x passes through shared memory once more to be masked
    return (2 * tile.rows * itemsize + tile.cols * 4) * tile.depth, 0


def _single_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    stage, beside = operands(tile, itemsize)
    return stage + tile.rank * tile.depth * 4, beside


def _tall_shared(tile: Tile, itemsize: int) -> tuple[int, int]:
    return tile.rows * (tile.cols + tile.rank) * itemsize, 0


LORA_DOWN = Kernel(
    name="lora_down",
    function=("lora.down", "_lora_down_kernel"),
    axes={"rows": "M", "depth": "K", "rank": "R"},
    tiles=_down,
    shared=_down_shared,
    split="depth",
    varies=("HAS_DROPOUT",),
)
LORA_FORWARD = Kernel(
    name="lora_forward",
    function=("lora.forward", "_lora_forward_kernel"),
    axes={"rows": "M", "cols": "N", "depth": "K", "rank": "R"},
    tiles=_large_or_persistent,
    grouped=True,
    persistent=("lora.persistent", "_lora_forward_persistent_kernel"),
    descriptors=lambda tile: {
        "x_desc": (tile.rows, tile.depth),
        "weight_desc": (tile.cols, tile.depth),
        "y_desc": (tile.rows, tile.cols // 2),
    },
    absent=("HAS_FACTOR", "KEEP_PRODUCT"),
    optional=(("HAS_BIAS",),),
)
LORA_FORWARD_SINGLE = Kernel(
    name="lora_forward_single",
    function=("lora.single", "_lora_forward_single_kernel"),
    axes={"rows": "M", "cols": "N", "depth": "K", "rank": "R"},
    tiles=_single,
    shared=_single_shared,
    grouped=True,
    optional=(("HAS_BIAS",),),
)
LORA_ADD = Kernel(
    name="lora_add",
    function=("lora.epilogue", "_lora_add_kernel"),
    axes={"rows": "M", "cols": "C", "rank": "R"},
    tiles=_add,
    grouped=True,
    varies=("HAS_DROPOUT",),
)
LORA_GRAD_S_B = Kernel(
    name="lora_grad_s_b",
    function=("lora.backward", "_lora_grad_s_b_kernel"),
    axes={"rows": "M", "cols": "N", "rank": "R"},
    tiles=_grad_s_b,
    shared=_tall_shared,
    split="rows",
)
LORA_GRAD_X = Kernel(
    name="lora_grad_x",
    function=("lora.backward", "_lora_grad_x_kernel"),
    axes={"rows": "M", "cols": "K", "depth": "N", "rank": "R"},
    tiles=_large,
    grouped=True,
    varies=("HAS_DROPOUT",),
)
LORA_GRAD_A = Kernel(
    name="lora_grad_a",
    function=("lora.backward", "_lora_grad_a_kernel"),
    axes={"rows": "M", "cols": "K", "rank": "R"},
    tiles=_skinny,
    shared=_tall_shared,
    split="rows",
    varies=("HAS_DROPOUT",),
    has_parameters=False,
)
LORA_GRAD_X_A = Kernel(
    name="lora_grad_x_a",
    function=("lora.grad_x_a", "_lora_grad_x_a_kernel"),
    axes={"rows": "M", "cols": "K", "depth": "N", "rank": "R"},
    tiles=_grad_x_a,
    grouped=True,
    split="rows",
    beside=grad_a_part,
    persistent=("lora.persistent", "_lora_grad_x_a_persistent_kernel"),
    descriptors=lambda tile: {
        "dy_desc": (tile.rows, tile.depth),
        "weight_desc": (tile.depth, tile.cols),
        "dx_desc": (tile.rows, tile.cols // 2),
    },
    varies=("HAS_DROPOUT",),
)
DORA_FORWARD = Kernel(
    name="dora_forward",
    # LoRA's with a factor
    function=LORA_FORWARD.function,
    axes=LORA_FORWARD.axes,
    tiles=_large_storing_twice,
    grouped=True,
    optional=(("HAS_BIAS",), ("KEEP_PRODUCT",)),
)
# the other two are bound by their one read, with small products or none: the same tile everywhere
DORA_WEIGHT_NORM = Kernel(
    name="dora_weight_norm",
    function=("lora.dora", "_dora_weight_norm_kernel"),
    axes={"rows": "N", "cols": "K", "rank": "R"},
    tiles=lambda *_: [Tile(rows=32, cols=64, depth=1, rank=16, warps=4, stages=2)],
)
DORA_GRAD_PRODUCT = Kernel(
    name="dora_grad_product",
    function=("lora.dora", "_dora_grad_product_kernel"),
    axes={"rows": "M", "cols": "N"},
    tiles=lambda *_: [Tile(rows=16, cols=128, depth=1, rank=1, warps=4, stages=1)],
    split="rows",
    optional=(("HAS_PRODUCT",),),
    has_parameters=False,
)
KERNELS = (
    LORA_DOWN, LORA_FORWARD, LORA_FORWARD_SINGLE, LORA_ADD, LORA_GRAD_S_B, LORA_GRAD_X, LORA_GRAD_A,
    LORA_GRAD_X_A, DORA_FORWARD, DORA_WEIGHT_NORM, DORA_GRAD_PRODUCT,
)  # fmt: skip
