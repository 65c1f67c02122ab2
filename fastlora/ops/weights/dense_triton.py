"""Dense rows of quantised weights by the ``triton`` backend: one launch, which reads what is stored once."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops.decide import in_wide_words
from fastlora.ops.prepared import prepared
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
    dense = torch.empty(shape, dtype=dtype, device=packed.device)
    _dequantise_4bit(packed, *factors, table, dense, first=first, blocksize=blocksize)
    return dense


def eight_bit(
    codes: Tensor,
    scales: Tensor,
    *,
    rows: slice,
    dtype: torch.dtype,
    scale_rows: int,
    scale_cols: int,
    scale: float = 1.0,
) -> Tensor:
    """Rows of a matrix of int8 or float8_e4m3fn codes ``[N, K]`` in a new tensor: code · scales · scale.

    Args:
        codes: Contiguous.
        scales: A float32 factor for each block of the matrix, contiguous.
        rows: From a first to a last one.
        dtype: What the new tensor is to hold, float32 or 16 bits.
        scale_rows: Rows of a block.
        scale_cols: Columns of a block: a multiple of 128, or all.
        scale: Factor of all values.
    """
    dense = torch.empty(rows.stop - rows.start, codes.shape[1], dtype=dtype, device=codes.device)
    _dequantise_8bit(
        codes.view(torch.uint8), scales, dense,
        first_row=rows.start, scale_rows=scale_rows, scale_cols=scale_cols, scale=scale,
        is_float=codes.is_floating_point(),
    )  # fmt: skip
    return dense


@prepared()
def _dequantise_8bit(
    codes: Tensor, scales: Tensor, dense: Tensor, *,
    first_row: int, scale_rows: int, scale_cols: int, scale: float, is_float: bool,
) -> Callable[..., None]:  # fmt: skip
    """Fill ``dense``; see the launcher."""
    settings = {"first_row": first_row, "scale_rows": scale_rows, "scale_cols": scale_cols}
    plan = _plan(DEQUANTISE_8BIT, dense, aligned=in_wide_words(*dense.shape, codes.data_ptr()))
    return Ready(dequantise_8bit, **settings, scale=scale, is_float=is_float, plan=plan)


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
