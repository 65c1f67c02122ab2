"""Operands that a library's 16-bit product on a CPU can be given."""

import torch
from torch import Tensor


def packed(matrix: Tensor) -> Tensor:
    """The matrix itself, or a copy without margins where a library product could read them.

    oneDNN's products on Intel's AMX take 16-bit numbers in pairs. Of a line of odd length that is followed by
    a margin, as in ``x[:, :37]``, they read the margin's first number too and count on its being finite:
    times zero, a NaN or an infinity there makes the whole result NaN.

    Args:
        matrix: ``[rows, columns]`` with any strides, on any device.
    """
    if matrix.element_size() != 2 or not matrix.is_cpu:
        return matrix
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    if column_stride == 1:
        reads_margin = columns % 2 == 1 and row_stride != columns
    else:
        reads_margin = rows % 2 == 1 and row_stride == 1 and column_stride != rows
    # not .contiguous(): to it a single row of a wider matrix is packed already
    return matrix.clone(memory_format=torch.contiguous_format) if reads_margin else matrix


def needs_no_packing(x: Tensor, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether the eager formula, which packs nothing, can't have an operand for :func:`packed` to copy.

    Args:
        x: ``[..., columns]``.
        dtype: What products compute in.
        sizes: Every other length of a line: columns, outputs, rank.
    """
    if dtype.itemsize != 2:
        return True
    # rows are a line's length in a gradient that comes transposed
    rows_even = x.shape[:-1].numel() % 2 == 0 or not torch.is_grad_enabled()
    return rows_even and x.stride(-1) == 1 and all(size % 2 == 0 for size in sizes)
