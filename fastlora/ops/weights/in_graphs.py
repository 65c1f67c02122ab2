"""Dense rows inside a compiled graph, which are made again for backward there, too.

What both passes make of the same tensors, a graph computes once and keeps: W, dense. So its rows are made by
an op that takes what they are multiplied with, too, in backward a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.ops.weights.four_bit import FourBitWeight
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.scaled import ScaledWeight
from fastlora.ops.weights.torchao import NF4Weight

_CLASSES: dict[str, type[FrozenWeight]] = {
    kind.__name__: kind for kind in (FourBitWeight, ScaledWeight, NF4Weight)
}


@torch.library.custom_op("fastlora::dense_rows", mutates_args=())
def dense_rows(
    like: Tensor,
    tensors: Sequence[Tensor],
    kind: str,
    numbers: Sequence[int],
    unit: float,
    start: int,
    stop: int,
) -> Tensor:
    """Rows of W ``[stop - start, K]`` in the dtype of what they are multiplied with.

    Args:
        like: What they are multiplied with.
        tensors: What is stored.
        kind: Name of the weight's class.
        numbers: What the class is made of beside the tensors, N and K first.
        unit: Another number for that, not a whole one.
        start: First row.
        stop: Row behind the last.
    """
    return _CLASSES[kind].rebuilt(tensors, numbers, unit).dense(like.dtype, slice(start, stop))


@dense_rows.register_fake
def _(
    like: Tensor,
    tensors: Sequence[Tensor],
    kind: str,
    numbers: Sequence[int],
    unit: float,
    start: int,
    stop: int,
) -> Tensor:
    return like.new_empty(stop - start, numbers[1])


def rows_for(like: Tensor, weight: FrozenWeight, rows: slice = slice(None)) -> Tensor:
    """Rows of W in a new tensor, to multiply with ``like`` and in its dtype."""
    if not torch.compiler.is_compiling():
        return weight.dense(like.dtype, rows)
    numbers, unit = weight.recipe()
    # what a slice says itself, torch 2.11 can't trace
    start, stop = rows.start or 0, weight.shape[0] if rows.stop is None else rows.stop
    dense: Tensor = dense_rows(like, weight.tensors, type(weight).__name__, numbers, unit, start, stop)
    return dense
