"""y = x·Wᵀ + bias + scale · (x·Aᵀ)·Bᵀ in one launch: for few rows, where launches cost most."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.kernels import LORA_FORWARD_SINGLE
from fastlora_kernels.primitives import (
    block_range,
    grouped_tile,
    load_tile,
    load_vector,
    store_tile,
)
from fastlora_kernels.tile import Plan, cdiv


@triton.jit
def _lora_forward_single_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
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
    stride_wn,
    scale,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x·Wᵀ + bias + S·Bᵀ and S = scale · x·Aᵀ, accumulated in fp32; bias_ptr may be absent.

    BLOCK_R holds the whole rank. Every program computes S for its rows, beside x·Wᵀ from the same tile of x;
    the first column of tiles stores it. It is rounded as it is stored: y must not depend on the path.
    """
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    offs_m = block_range(pid_m, BLOCK_M)
    offs_n = block_range(pid_n, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x_ptr, offs_m, offs_k, stride_xm, M, K)
        w_tile = load_tile(weight_ptr, offs_n, offs_k, stride_wn, N, K)
        a_tile = load_tile(lora_a_ptr, offs_r, offs_k, K, R, K).to(x_tile.dtype)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
        s = tl.dot(x_tile, tl.trans(a_tile), s, input_precision="ieee")

    s_tile = (s * scale).to(s_ptr.dtype.element_ty)
    if pid_n == 0:
        store_tile(s_ptr, s_tile, offs_m, offs_r, R, M, R)
    b_tile = load_tile(lora_b_ptr, offs_n, offs_r, R, N, R).to(s_tile.dtype)
    acc = tl.dot(s_tile, tl.trans(b_tile), acc, input_precision="ieee")

    if HAS_BIAS:
        acc += load_vector(bias_ptr, offs_n, N)[None, :]
    store_tile(y_ptr, acc, offs_m, offs_n, N, M, N)


def lora_forward_single(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    scale: float,
    plan: Plan,
) -> Launch | None:
    """Fill ``s [M, R]`` = scale · x·Aᵀ and ``y [M, N]`` = x·Wᵀ + bias + S·Bᵀ.

    x is ``[M, K]``, W ``[N, K]``, A ``[R, K]`` and B ``[N, R]``; the bias ``[N]`` may be None. The plan's
    tile must hold the whole rank; with N = 0 there is no program, and S stays unwritten.
    """
    (m, k), (n, r) = x.shape, lora_b.shape
    tile = plan.tile
    programs = cdiv(m, tile.rows) * cdiv(n, tile.cols)
    return launch(_lora_forward_single_kernel, LORA_FORWARD_SINGLE, tile, (programs,))(
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, lora_a_ptr=lora_a, lora_b_ptr=lora_b, s_ptr=s, y_ptr=y,
        M=m, N=n, K=k, R=r, stride_xm=x.stride(0), stride_wn=weight.stride(0), scale=scale,
        HAS_BIAS=bias is not None,
    )  # fmt: skip
