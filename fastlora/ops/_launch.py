"""What the kernels need to know of the tensors they are launched on."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def is_aligned(*matrices: Tensor) -> bool:
    """Whether rows can be read in wide words: sizes, row strides and addresses are multiples of 16."""
    return all(t.shape[1] % 16 == 0 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices)


def row_major(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous and apart from each other, else a contiguous copy.

    A broadcast or overlapping row is a stride that tensor descriptors don't take.
    """
    rows, cols = matrix.shape
    apart = rows < 2 or matrix.stride(0) >= cols
    return matrix if cols == 0 or (matrix.stride(1) == 1 and apart) else matrix.contiguous()


def current_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context with the tensor's GPU as the current one, where kernels launch."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
