"""y = x·Wᵀ + bias + S·Bᵀ, or for DoRA y = g ⊙ (x·Wᵀ + S·Bᵀ) + bias."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.kernels import LORA_FORWARD
from fastlora_kernels.primitives import (
    add_s_b,
    block_range,
    grouped_tile,
    load_tile,
    load_vector,
    store_tile,
)
from fastlora_kernels.tile import Plan, cdiv


@triton.jit
def _lora_forward_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    s_ptr,  # (M, R)
    lora_b_ptr,  # (N, R)
    y_ptr,  # (M, N)
    factor_ptr,  # (N,)
    product_ptr,  # (M, N)
    M,
    N,
    K,
    R,
    stride_xm,
    stride_wn,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    KEEP_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = g ⊙ product + bias, product = x·Wᵀ + S·Bᵀ, accumulated in fp32; S already carries alpha / r.

    bias_ptr may be absent, and factor_ptr, which holds DoRA's g; product_ptr where nobody keeps the product.

    The low-rank product joins the accumulator after the K loop, BLOCK_R ranks at a time, so that any rank
    fits and no shared memory is taken from the main loop.
    """
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    offs_m = block_range(pid_m, BLOCK_M)
    offs_n = block_range(pid_n, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x_ptr, offs_m, offs_k, stride_xm, M, K)
        w_tile = load_tile(weight_ptr, offs_n, offs_k, stride_wn, N, K)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")

    acc = add_s_b(acc, s_ptr, lora_b_ptr, offs_m, offs_n, M, N, R, BLOCK_R)

    if KEEP_PRODUCT:
        store_tile(product_ptr, acc, offs_m, offs_n, N, M, N)
    if HAS_FACTOR:
        acc *= load_vector(factor_ptr, offs_n, N)[None, :]
    if HAS_BIAS:
        acc += load_vector(bias_ptr, offs_n, N)[None, :]
    # DoRA's y is no part of a wider matrix, and its tiles have no register left
    store_tile(y_ptr, acc, offs_m, offs_n, N if HAS_FACTOR else stride_ym, M, N)


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    lora_b: Tensor,
    y: Tensor,
    factor: Tensor | None = None,
    product: Tensor | None = None,
    *,
    plan: Plan,
) -> Launch | None:
    """Fill ``y [M, N]`` = x·Wᵀ + bias + S·Bᵀ from x ``[M, K]``, W ``[N, K]``, S ``[M, R]`` and B ``[N, R]``.

    The bias ``[N]`` may be None, and y columns of a wider matrix. With a factor ``[N]`` y is no such columns,
    and the products are multiplied by it before the bias; ``product [M, N]`` is filled with what they were.
    """
    (m, k), (n, r) = x.shape, lora_b.shape
    tile = plan.tile
    programs = cdiv(m, tile.rows) * cdiv(n, tile.cols)
    return launch(_lora_forward_kernel, LORA_FORWARD, tile, (programs,))(
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, s_ptr=s, lora_b_ptr=lora_b, y_ptr=y,
        factor_ptr=factor, product_ptr=product,
        M=m, N=n, K=k, R=r, stride_xm=x.stride(0), stride_wn=weight.stride(0), stride_ym=y.stride(0),
        HAS_BIAS=bias is not None, HAS_FACTOR=factor is not None, KEEP_PRODUCT=product is not None,
    )  # fmt: skip
