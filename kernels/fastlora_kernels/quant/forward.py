"""y = x·Wᵀ + bias + S·Bᵀ in a launch that decodes a quantised W in its loop; from 4 bits, S on the way."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.primitives import (
    add_s_b,
    block_range,
    grouped_tile,
    load_tile,
    load_vector,
    store_tile,
)
from fastlora_kernels.quant.dequantise import code_values, load_absmax
from fastlora_kernels.quant.kernels import LORA_FORWARD_4BIT, LORA_FORWARD_8BIT
from fastlora_kernels.tile import Plan, cdiv


@triton.jit(do_not_specialize=["blocks_per_row", "block_shift"])
def _lora_forward_4bit_kernel(
    x_ptr,  # (M, K)
    packed_ptr,  # (N, K / 2)
    absmax_ptr,  # (N * blocks_per_row,), with HAS_NESTED one for each 256 of them
    absmax_codes_ptr,  # (N * blocks_per_row,)
    absmax_map_ptr,  # (256,)
    offset_ptr,  # (1,)
    table_ptr,  # (16,)
    bias_ptr,  # (N,)
    lora_a_ptr,  # (R, K)
    lora_b_ptr,  # (N, R)
    s_ptr,  # (M, R)
    y_ptr,  # (M, N)
    M,
    N,
    K,
    R,
    stride_xm,
    bytes_per_row,
    blocks_per_row,
    block_shift,
    scale,
    HAS_NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x·Wᵀ + bias + S·Bᵀ and S = scale · x·Aᵀ in fp32; W = table[code] · absmax[block] in x's dtype.

    K is whole blocks long, each of 2^block_shift values, and a block whole steps: a row has one factor in a
    step. bias_ptr may be absent, and without HAS_NESTED what the factors are made of. BLOCK_R holds the whole
    rank; S is rounded as it is stored, by the first column of tiles.
    """
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    offs_m = block_range(pid_m, BLOCK_M)
    offs_n = block_range(pid_n, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    inside = offs_n < N
    bytes_ = offs_n.to(tl.int64)[:, None] * bytes_per_row + tl.arange(0, BLOCK_K // 2)[None, :]
    table = tl.load(table_ptr + tl.arange(0, 16))

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x_ptr, offs_m, offs_k, stride_xm, M, K)
        a_tile = load_tile(lora_a_ptr, offs_r, offs_k, K, R, K).to(x_tile.dtype)
        pairs = tl.load(packed_ptr + k // 2 + bytes_, mask=inside[:, None], other=0).to(tl.int32)
        blocks = offs_n * blocks_per_row + (k >> block_shift)
        absmax = load_absmax(
            absmax_ptr, absmax_codes_ptr, absmax_map_ptr, offset_ptr, blocks, inside, HAS_NESTED
        )
        codes = tl.reshape(tl.join(pairs >> 4, pairs & 15), (BLOCK_N * BLOCK_K,))
        w_tile = tl.reshape(tl.gather(table, codes, 0), (BLOCK_N, BLOCK_K)) * absmax[:, None]
        acc = tl.dot(x_tile, tl.trans(w_tile.to(x_tile.dtype)), acc, input_precision="ieee")
        s = tl.dot(x_tile, tl.trans(a_tile), s, input_precision="ieee")

    s_tile = (s * scale).to(s_ptr.dtype.element_ty)
    if pid_n == 0:
        store_tile(s_ptr, s_tile, offs_m, offs_r, R, M, R)
    b_tile = load_tile(lora_b_ptr, offs_n, offs_r, R, N, R).to(s_tile.dtype)
    acc = tl.dot(s_tile, tl.trans(b_tile), acc, input_precision="ieee")

    if HAS_BIAS:
        acc += load_vector(bias_ptr, offs_n, N)[None, :]
    store_tile(y_ptr, acc, offs_m, offs_n, N, M, N)


def lora_forward_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_codes: Tensor | None,
    absmax_map: Tensor | None,
    offset: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    blocksize: int,
    scale: float,
    plan: Plan,
) -> Launch | None:
    """Fill ``s [M, R]`` = scale · x·Aᵀ and ``y [M, N]`` = x·Wᵀ + bias + S·Bᵀ.

    x is ``[M, K]``, A ``[R, K]`` and B ``[N, R]``; the bias ``[N]`` may be None. W ``[N, K]`` is, to the bit,
    what :func:`~fastlora_kernels.quant.dequantise.dequantise_4bit` makes of the same tensors in x's dtype. K
    is a multiple of ``blocksize``, a power of 2 from 64 on. The plan's tile must hold the whole rank.
    """
    (m, k), (n, r) = x.shape, lora_b.shape
    tile = plan.tile
    programs = cdiv(m, tile.rows) * cdiv(n, tile.cols)
    return launch(_lora_forward_4bit_kernel, LORA_FORWARD_4BIT, tile, (programs,))(
        x_ptr=x, packed_ptr=packed, absmax_ptr=absmax, absmax_codes_ptr=absmax_codes,
        absmax_map_ptr=absmax_map, offset_ptr=offset, table_ptr=table,
        bias_ptr=bias, lora_a_ptr=lora_a, lora_b_ptr=lora_b, s_ptr=s, y_ptr=y,
        M=m, N=n, K=k, R=r, stride_xm=x.stride(0), bytes_per_row=k // 2,
        blocks_per_row=k // blocksize, block_shift=blocksize.bit_length() - 1, scale=scale,
        HAS_NESTED=absmax_codes is not None, HAS_BIAS=bias is not None,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_scales"])
def _lora_forward_8bit_kernel(
    x_ptr,  # (M, K)
    codes_ptr,  # (N, K)
    scales_ptr,  # (N,) or (1,)
    bias_ptr,  # (N,)
    s_ptr,  # (M, R)
    lora_b_ptr,  # (N, R)
    y_ptr,  # (M, N)
    M,
    N,
    K,
    R,
    stride_xm,
    stride_scales,
    IS_FLOAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = scales ⊙ (x·codesᵀ) + S·Bᵀ + bias, accumulated in fp32; S already carries alpha / r.

    Codes are int8, with IS_FLOAT floats of 4 and 3 bits (e4m3fn): both are exact in x's dtype, so that W is
    never rounded. Without a stride all rows of W have one scale. bias_ptr may be absent.
    """
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    offs_m = block_range(pid_m, BLOCK_M)
    offs_n = block_range(pid_n, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x_ptr, offs_m, offs_k, stride_xm, M, K)
        codes = load_tile(codes_ptr, offs_n, offs_k, K, N, K)
        code_tile = code_values(codes, IS_FLOAT).to(x_tile.dtype)
        acc = tl.dot(x_tile, tl.trans(code_tile), acc, input_precision="ieee")

    acc *= tl.load(scales_ptr + offs_n * stride_scales, mask=offs_n < N, other=0.0)[None, :]
    acc = add_s_b(acc, s_ptr, lora_b_ptr, offs_m, offs_n, M, N, R, BLOCK_R)
    if HAS_BIAS:
        acc += load_vector(bias_ptr, offs_n, N)[None, :]
    store_tile(y_ptr, acc, offs_m, offs_n, N, M, N)


def lora_forward_8bit(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    s: Tensor,
    lora_b: Tensor,
    y: Tensor,
    *,
    is_float: bool,
    plan: Plan,
) -> Launch | None:
    """Fill ``y [M, N]`` = scales ⊙ (x·codesᵀ) + S·Bᵀ + bias from x ``[M, K]``, S ``[M, R]`` and B ``[N, R]``.

    ``codes [N, K]`` are the bytes (uint8) of int8 numbers or, with ``is_float``, of e4m3fn ones, contiguous;
    ``scales`` (fp32) has one for each of their rows or one for all. The bias ``[N]`` may be None.
    """
    (m, k), (n, r) = x.shape, lora_b.shape
    tile = plan.tile
    programs = cdiv(m, tile.rows) * cdiv(n, tile.cols)
    return launch(_lora_forward_8bit_kernel, LORA_FORWARD_8BIT, tile, (programs,))(
        x_ptr=x, codes_ptr=codes, scales_ptr=scales, bias_ptr=bias, s_ptr=s, lora_b_ptr=lora_b, y_ptr=y,
        M=m, N=n, K=k, R=r, stride_xm=x.stride(0), stride_scales=0 if scales.numel() == 1 else 1,
        IS_FLOAT=is_float, HAS_BIAS=bias is not None,
    )  # fmt: skip
