"""Quantised weights made dense, each in one launch that reads what is stored once."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.primitives import block_range, store_tile
from fastlora_kernels.quant.kernels import DEQUANTISE_4BIT, DEQUANTISE_8BIT, SPAN
from fastlora_kernels.tile import Plan, cdiv

_SPAN = tl.constexpr(SPAN)
# blocks whose factors share one of their own
_NESTED_BLOCKS = 256
_NESTED_SHIFT = tl.constexpr(_NESTED_BLOCKS.bit_length() - 1)
_STORE_BYTES = tl.constexpr(16)


@triton.jit
def load_absmax(
    absmax_ptr, absmax_codes_ptr, absmax_map_ptr, offset_ptr, blocks, inside, HAS_NESTED: tl.constexpr
):
    """Factors of ``blocks`` in fp32; product and sum of nested ones are rounded one after the other."""
    if HAS_NESTED:
        codes = tl.load(absmax_codes_ptr + blocks, mask=inside, other=0)
        factor = tl.load(absmax_ptr + (blocks >> _NESTED_SHIFT), mask=inside, other=0.0)
        return tl.load(absmax_map_ptr + codes) * factor + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + blocks, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["first_span", "block_shift"])
def _dequantise_4bit_kernel(
    packed_ptr,  # (N * K / 2,)
    absmax_ptr,  # (blocks,), with HAS_NESTED (blocks / 256,)
    absmax_codes_ptr,  # (blocks,)
    absmax_map_ptr,  # (256,)
    offset_ptr,  # (1,)
    table_ptr,  # (16,)
    dense_ptr,  # (count,)
    first_span,
    skipped,
    end,
    end_byte,
    block_shift,
    HAS_NESTED: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
):
    """dense = table[code] · absmax[block] in fp32, rounded once; of two codes the first is in the high bits.

    Elements are counted from the span ``first_span`` on, of which ``skipped`` are left out; a block is
    2^block_shift spans long. With HAS_NESTED, absmax = map[absmax_codes] · absmax_ptr[block / 256] + offset;
    without, the three are absent.
    """
    # a program's elements are counted in 32 bits; where it begins in the whole array, in 64
    start = tl.program_id(0) * BLOCK_SPANS
    spans = start + tl.arange(0, BLOCK_SPANS)
    blocks = (first_span + spans) >> block_shift
    absmax = load_absmax(
        absmax_ptr, absmax_codes_ptr, absmax_map_ptr, offset_ptr, blocks, spans * _SPAN < end, HAS_NESTED
    )
    # as many bytes a thread as make one wide store: what it reads, it stores, and nothing is exchanged
    values_per_store: tl.constexpr = _STORE_BYTES * 8 // dense_ptr.dtype.element_ty.primitive_bitwidth
    bytes_ = spans[:, None] * (_SPAN // 2) + tl.arange(0, _SPAN // 2)[None, :]
    bytes_ = tl.max_contiguous(bytes_, [1, values_per_store // 2])
    packed_ptr += first_span.to(tl.int64) * (_SPAN // 2)
    pairs = tl.load(packed_ptr + bytes_, mask=bytes_ < end_byte, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pairs >> 4, pairs & 15), (BLOCK_SPANS * _SPAN,))
    # a table of 16 words in shared memory, one bank each: lanes that look up others never wait for each other
    values = tl.gather(tl.load(table_ptr + tl.arange(0, 16)), codes, 0)
    values = tl.reshape(values, (BLOCK_SPANS, _SPAN)) * absmax[:, None]

    elements = spans[:, None] * _SPAN + tl.arange(0, _SPAN)[None, :]
    inside = (elements >= skipped) & (elements < end)
    tl.store(dense_ptr + (elements - skipped), values.to(dense_ptr.dtype.element_ty), mask=inside)


def dequantise_4bit(
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
    plan: Plan,
) -> Launch | None:
    """Fill ``dense`` with as many elements of a 4-bit array as it has, from element ``first`` on.

    ``packed`` is uint8, two codes a byte with the first in the high bits; ``table [16]`` says what a code
    stands for, and each ``blocksize`` elements, a power of 2 from 32 on, share a factor ``absmax`` (fp32).
    Where the factors are quantised themselves, their ``absmax_codes`` (uint8) stand for values of
    ``absmax_map [256]``, each 256 share a factor ``absmax``, and ``offset [1]`` is added; else the three are
    None. ``dense`` is contiguous and has at most ``MOST_ELEMENTS`` elements.
    """
    first_span, skipped = divmod(first, SPAN)
    end, tile = skipped + dense.numel(), plan.tile
    grid = (cdiv(end, tile.rows * SPAN),) if dense.numel() else (0,)
    return launch(_dequantise_4bit_kernel, DEQUANTISE_4BIT, tile, grid)(
        packed_ptr=packed, absmax_ptr=absmax, absmax_codes_ptr=absmax_codes, absmax_map_ptr=absmax_map,
        offset_ptr=offset, table_ptr=table, dense_ptr=dense,
        first_span=first_span, skipped=skipped, end=end, end_byte=cdiv(end, 2),
        block_shift=(blocksize // SPAN).bit_length() - 1, HAS_NESTED=absmax_codes is not None,
    )  # fmt: skip


@triton.jit
def code_values(codes, IS_FLOAT: tl.constexpr):
    """The fp32 values of bytes, exactly: of int8 numbers, with IS_FLOAT of e4m3fn ones."""
    signed = codes.to(tl.int8, bitcast=True).to(tl.int32)
    if IS_FLOAT:
        # bits are put where a float has them, and copies of the sign that are in between left out
        placed = (signed.to(tl.uint32, bitcast=True) << 20) & 0x87F00000
        # exponents count from 127 and not from 7: times 2^120, which makes normal numbers of subnormal ones
        values = placed.to(tl.float32, bitcast=True) * 1.329227995784916e36
        # what would be 480 is NaN
        return tl.where(tl.abs(values) == 480.0, float("nan"), values)
    else:
        # added to the bits of 1.5 · 2^23, whose last one stands for 1: no conversion
        return (signed + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit(do_not_specialize=["first_row", "scale_rows", "scale_cols", "scales_per_row"])
def _dequantise_8bit_kernel(
    codes_ptr,  # (N, K)
    scales_ptr,  # (N / scale_rows, scales_per_row)
    dense_ptr,  # (rows, K)
    first_row,
    N,
    K,
    scale_rows,
    scale_cols,
    scales_per_row,
    IS_FLOAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dense = code · scales[block] in fp32, rounded once; rows begin at ``first_row``.

    Blocks are scale_rows × scale_cols large. Codes are int8, with IS_FLOAT floats of 4 and 3 bits (e4m3fn).
    """
    offs_n = block_range(tl.program_id(0), BLOCK_N)
    k = tl.program_id(1) * BLOCK_K
    offs_k = k + tl.arange(0, BLOCK_K)
    rows = first_row + offs_n
    scales = tl.load(
        scales_ptr + rows // scale_rows * scales_per_row + k // scale_cols, mask=offs_n < N, other=0.0
    )
    # as many bytes a thread as make one wide store, as above
    values_per_store: tl.constexpr = _STORE_BYTES * 8 // dense_ptr.dtype.element_ty.primitive_bitwidth
    offsets = rows.to(tl.int64)[:, None] * K + offs_k[None, :]
    offsets = tl.max_contiguous(offsets, [1, values_per_store])
    inside = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    codes = tl.load(codes_ptr + offsets, mask=inside, other=0)
    values = code_values(codes, IS_FLOAT)
    store_tile(dense_ptr, values * scales[:, None], offs_n, offs_k, K, N, K)


def dequantise_8bit(
    codes: Tensor,
    scales: Tensor,
    dense: Tensor,
    *,
    first_row: int,
    scale_rows: int,
    scale_cols: int,
    is_float: bool,
    plan: Plan,
) -> Launch | None:
    """Fill ``dense [rows, K]`` with rows of an 8-bit matrix from ``first_row`` on.

    ``codes [N, K]`` are the bytes (uint8) of int8 numbers or, with ``is_float``, of e4m3fn ones; ``scales``
    (fp32, contiguous) has one for each block of ``scale_rows`` rows and ``scale_cols`` columns, a multiple of
    128 or all of them. Both matrices are contiguous.
    """
    (n, k), tile = dense.shape, plan.tile
    scales_per_row = cdiv(k, scale_cols) if k else 1
    grid = (cdiv(n, tile.rows), cdiv(k, tile.cols))
    return launch(_dequantise_8bit_kernel, DEQUANTISE_8BIT, tile, grid)(
        codes_ptr=codes, scales_ptr=scales, dense_ptr=dense,
        first_row=first_row, N=n, K=k, scale_rows=scale_rows, scale_cols=scale_cols,
        scales_per_row=scales_per_row, IS_FLOAT=is_float,
    )  # fmt: skip
