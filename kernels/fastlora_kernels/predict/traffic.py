"""How many bytes a matrix product moves between memory and the last cache.

Tiles that run at the same time share what they read. One wave of them covers some rows and some columns of
the output; the left operand is read once for every wave's width of columns, the right one once for every
wave's height of rows, unless it is still in the cache. Re-reads come on top, because the tiles of a wave
drift apart.
"""

import math
from dataclasses import dataclass

from fastlora_kernels.targets import Target

# fitted to the traffic that LoRAFusion's authors measured on an H100, of their kernels and of eager PyTorch
DRIFT = 0.22


@dataclass(frozen=True)
class Wave:
    """Output rows and columns that the tiles running at the same time cover."""

    rows: float
    cols: float


def grouped_wave(tile_rows: int, tile_cols: int, group: int, at_once: int) -> Wave:
    """The wave of tiles that walk the columns in groups of row tiles, as our kernels do.

    Args:
        tile_rows: Rows of a tile.
        tile_cols: Columns of a tile.
        group: Row tiles of a group.
        at_once: Tiles that run at the same time.
    """
    return Wave(group * tile_rows, max(1.0, at_once / group) * tile_cols)


def square_wave(tile_rows: int, tile_cols: int, at_once: int) -> Wave:
    """The wave of a library that orders its tiles well.

    Args:
        tile_rows: Rows of a tile.
        tile_cols: Columns of a tile.
        at_once: Tiles that run at the same time.
    """
    side = math.sqrt(at_once * tile_rows * tile_cols)
    return Wave(side, side)


def product_bytes(m: int, n: int, k: int, itemsize: int, wave: Wave, target: Target) -> float:
    """Bytes that ``[m, k]·[k, n]`` reads and writes.

    Args:
        m: Rows of the output.
        n: Columns.
        k: Length of the sums.
        itemsize: Bytes of an element.
        wave: What runs at the same time.
        target: The GPU, for its cache.
    """
    left, right, out = m * k * itemsize, k * n * itemsize, m * n * itemsize
    height, width = min(wave.rows, m) or 1, min(wave.cols, n) or 1
    left_slab, right_slab = height * k * itemsize, width * k * itemsize
    # what passes the cache until an operand is needed again
    lost_right = lost(right + left_slab + height * n * itemsize, target)
    lost_left = lost(left_slab + right_slab, target)
    read = left * (1 + (n / width - 1) * lost_left) + right * (1 + (m / height - 1) * lost_right)
    return read * (1 + DRIFT * max(lost_left, lost_right)) + out


def lost(between_uses: float, target: Target) -> float:
    """Share of what was read or written that is gone from the cache when it is needed again.

    Args:
        between_uses: Bytes that pass the cache in the meantime.
        target: The GPU.
    """
    return min(max(between_uses / target.l2_bytes - 1, 0.0), 1.0)
