"""What kernels, plans and ops have to agree on: shapes, tiles, plans and two numbers. Needs no Triton."""

from dataclasses import dataclass

# elements whose keep bits share one int32 of the packed dropout mask
MASK_WORD_BITS = 32
# row tiles that walk the columns together, so that what they share stays in L2
TILES_PER_GROUP = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer call.

    A bottleneck adapter has n = k = its hidden size and r = its bottleneck.

    Attributes:
        m: Rows of x ``[m, k]``.
        n: Outputs: rows of the weight ``[n, k]``.
        k: Inputs.
        r: Rank of the LoRA update.
        aligned: Whether n, k, the row strides and the addresses are multiples of 16, so that rows can be read
            in wide words. Without it every element has an address of its own: large tiles run out of
            registers.
    """

    m: int
    n: int
    k: int
    r: int
    aligned: bool = True

    def size(self, axis: str) -> int:
        """Length of an axis by its name in the kernels: M, N, K, R, and an adapter's H (hidden) and D."""
        return {"M": self.m, "N": self.n, "K": self.k, "R": self.r, "H": self.k, "D": self.r}[axis]


@dataclass(frozen=True)
class Tile:
    """Block sizes of one program.

    Attributes:
        rows: Rows of the output.
        cols: Columns of the output.
        depth: Elements of one step of the reduction.
        rank: Ranks at a time.
        warps: Warps of the program.
        stages: Stages of its pipeline.
        persistent: Whether it reads through tensor descriptors and takes one tile after another.
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

    Attributes:
        tile: Block sizes.
        splits: How many parts the reduction over a long axis is cut into; their fp32 partial results are
            summed in a second, deterministic step.
    """

    tile: Tile
    splits: int = 1

    def part(self, length: int, step: int) -> int:
        """Length of each part of an axis that is cut, in whole steps of a program's loop."""
        return cdiv(length, self.splits * step) * step


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
