"""Dense rows of quantised weights by the ``triton`` backend: one launch, which reads what is stored once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.decide import WITHOUT_PATHS, Decision, in_wide_words
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import registered
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.launch import Ready
from fastlora_kernels.quant.dequantise import dequantise_4bit, dequantise_8bit
from fastlora_kernels.quant.kernels import DEQUANTISE_4BIT, DEQUANTISE_8BIT, SPAN
from fastlora_kernels.tile import Plan, Shape

# absmax, and where that is quantised itself its codes, what they stand for and the offset
Factors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def four_bit(
    packed: Tensor,
    factors: Factors,
    table: Tensor,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    first: int,
    blocksize: int,
) -> Tensor:
    """A new tensor of this shape: as many elements of a 4-bit array, from its element ``first`` on."""
    return _dense_four_bit(packed, *factors, table, *shape, dtype, first, blocksize, WITHOUT_PATHS["triton"])


def _fake_four_bit(packed: Tensor, *call: Any) -> Tensor:
    rows, columns, dtype = call[5:8]
    return packed.new_empty(rows, columns, dtype=dtype)


@registered(_fake_four_bit)
def _dense_four_bit(
    packed: Tensor,
    absmax: Tensor,
    absmax_codes: Tensor | None,
    absmax_map: Tensor | None,
    offset: Tensor | None,
    table: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    first: int,
    blocksize: int,
    decision: Decision,
) -> Tensor:
    """The operator: what traces a call has to see it."""
    dense = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    stored = (packed, absmax, absmax_codes, absmax_map, offset, table)
    _dequantise_4bit(*stored, dense, first=first, blocksize=blocksize)
    return dense


def eight_bit(
    codes: Tensor,
    scales: Tensor,
    *,
    rows: slice,
    dtype: torch.dtype,
    scale_rows: int,
    scale_cols: int,
) -> Tensor:
    """Rows of a matrix of int8 or float8_e4m3fn codes ``[N, K]`` in a new tensor: each times its factor.

    Args:
        codes: Contiguous.
        scales: A float32 factor for each block of the matrix, contiguous.
        rows: From a first to a last one.
        dtype: What the new tensor is in, for instance bfloat16.
        scale_rows: Rows of a block.
        scale_cols: Columns of a block: a multiple of 128, or all.
    """
    blocks = (rows.start, rows.stop, dtype, scale_rows, scale_cols)
    return _dense_eight_bit(codes, scales, *blocks, WITHOUT_PATHS["triton"])


def _fake_eight_bit(codes: Tensor, scales: Tensor, start: int, stop: int, *call: Any) -> Tensor:
    return codes.new_empty(stop - start, codes.shape[1], dtype=call[0])


@registered(_fake_eight_bit)
def _dense_eight_bit(
    codes: Tensor,
    scales: Tensor,
    start: int,
    stop: int,
    dtype: torch.dtype,
    scale_rows: int,
    scale_cols: int,
    decision: Decision,
) -> Tensor:
    """The operator: what traces a call has to see it."""
    dense = torch.empty(stop - start, codes.shape[1], dtype=dtype, device=codes.device)
    _dequantise_8bit(
        codes.view(torch.uint8), scales, dense,
        first_row=start, scale_rows=scale_rows, scale_cols=scale_cols, is_float=codes.is_floating_point(),
    )  # fmt: skip
    return dense


@prepared()
def _dequantise_8bit(
    codes: Tensor, scales: Tensor, dense: Tensor, *,
    first_row: int, scale_rows: int, scale_cols: int, is_float: bool,
) -> Callable[..., None]:  # fmt: skip
    """Fill ``dense``; see the launcher."""
    settings = {"first_row": first_row, "scale_rows": scale_rows, "scale_cols": scale_cols}
    plan = _plan(DEQUANTISE_8BIT, dense, aligned=in_wide_words(*dense.shape, codes.data_ptr()))
    return Ready(dequantise_8bit, **settings, is_float=is_float, plan=plan)


@prepared()
def _dequantise_4bit(
    packed: Tensor,
    absmax: Tensor,
    absmax_codes: Tensor | None,
    absmax_map: Tensor | None,
    offset: Tensor | None,
    table: Tensor,
    dense: Tensor,
    *,
    first: int,
    blocksize: int,
) -> Callable[..., None]:
    """Fill ``dense``; see the launcher."""
    aligned = in_wide_words(first, packed.data_ptr()) and (first + dense.numel()) % SPAN == 0
    plan = _plan(DEQUANTISE_4BIT, dense, aligned=aligned)
    return Ready(dequantise_4bit, first=first, blocksize=blocksize, plan=plan)


def _plan(kernel: Kernel, dense: Tensor, *, aligned: bool) -> Plan:
    rows, columns = dense.shape
    shape = Shape(m=0, n=rows, k=columns, r=1, aligned=aligned)
    return plans.choose(kernel, shape, dense.dtype, targets.detect(dense.device))
