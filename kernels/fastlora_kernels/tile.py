"""What kernels, plans and ops have to agree on: shapes, tiles, plans and two numbers. Needs no Triton."""

from dataclasses import dataclass

# elements whose keep bits share one int32 of the packed dropout mask
MASK_WORD_BITS = 32
# row tiles that walk the columns together, so that what they share stays in L2
TILES_PER_GROUP = 8


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
    """Block sizes of one program: output rows × cols, the step of the reduction, and ranks at a time.

    A persistent one reads through tensor descriptors and takes one tile after another.
    """

    rows: int
    cols: int
    depth: int
    rank: int
    warps: int
    stages: int
    persistent: bool = False


@dataclass(frozen=True)
class Plan:
    """The choice for one kernel.

    ``splits`` is into how many parts the reduction over a long axis is cut; their fp32 partial results are
    summed in a second, deterministic step.
    """

    tile: Tile
    splits: int = 1


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
