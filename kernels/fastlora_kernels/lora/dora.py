"""What DoRA adds to the LoRA kernels: the norms of W + s·B·A, and the backward pass of the factor g."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.kernels import DORA_GRAD_PRODUCT, DORA_WEIGHT_NORM
from fastlora_kernels.primitives import block_range, load_tile, load_vector, store_tile
from fastlora_kernels.tile import Plan, cdiv


@triton.jit
def _dora_weight_norm_kernel(
    weight_ptr,  # (N, K)
    lora_a_ptr,  # (R, K)
    lora_b_ptr,  # (N, R)
    norm_ptr,  # (N,)
    N,
    K,
    R,
    stride_wn,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """norm = ‖W + scale · B·A‖ of every row, in fp32; the sum exists a tile at a time."""
    offs_n = block_range(tl.program_id(0), BLOCK_N)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R)
            b_tile = load_tile(lora_b_ptr, offs_n, offs_r, R, N, R).to(tl.float32)
            a_tile = load_tile(lora_a_ptr, offs_r, offs_k, K, R, K).to(tl.float32)
            update = tl.dot(b_tile, a_tile, update, input_precision="ieee")
        updated = load_tile(weight_ptr, offs_n, offs_k, stride_wn, N, K).to(tl.float32) + scale * update
        squares += tl.sum(updated * updated, axis=1)
    tl.store(norm_ptr + offs_n, tl.sqrt(squares), mask=offs_n < N)


def dora_weight_norm(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, norm: Tensor, *, scale: float, plan: Plan
) -> Launch | None:
    """Fill ``norm [N]`` (fp32) = ‖W + scale · B·A‖ from W ``[N, K]``, A ``[R, K]`` and B ``[N, R]``."""
    (n, k), r, tile = weight.shape, lora_a.shape[0], plan.tile
    return launch(_dora_weight_norm_kernel, DORA_WEIGHT_NORM, tile, (cdiv(n, tile.rows),))(
        weight_ptr=weight, lora_a_ptr=lora_a, lora_b_ptr=lora_b, norm_ptr=norm,
        N=n, K=k, R=r, stride_wn=weight.stride(0), scale=scale,
    )  # fmt: skip


@triton.jit
def _dora_grad_product_kernel(
    dy_ptr,  # (M, N)
    product_ptr,  # (M, N)
    factor_ptr,  # (N,)
    dproduct_ptr,  # (M, N)
    dfactor_partial_ptr,  # (row groups, N)
    M,
    N,
    stride_dym,
    rows_per_group,
    HAS_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dproduct = factor ⊙ dY, and dfactor_partial[row group] = Σ_m dY ⊙ product, in fp32.

    product_ptr and dfactor_partial_ptr are absent where the factor needs no gradient. Summing the partial
    results over their first dimension is the second, deterministic step.
    """
    group = tl.program_id(1)
    offs_n = block_range(tl.program_id(0), BLOCK_N)
    factor = load_vector(factor_ptr, offs_n, N)
    dfactor = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for m in range(group * rows_per_group, min(M, (group + 1) * rows_per_group), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        dy_tile = load_tile(dy_ptr, offs_m, offs_n, stride_dym, M, N).to(tl.float32)
        store_tile(dproduct_ptr, dy_tile * factor[None, :], offs_m, offs_n, N, M, N)
        if HAS_PRODUCT:
            product_tile = load_tile(product_ptr, offs_m, offs_n, N, M, N).to(tl.float32)
            dfactor += tl.sum(dy_tile * product_tile, axis=0)
    if HAS_PRODUCT:
        tl.store(dfactor_partial_ptr + group.to(tl.int64) * N + offs_n, dfactor, mask=offs_n < N)


def dora_grad_product(
    dy: Tensor,
    product: Tensor | None,
    factor: Tensor,
    dproduct: Tensor,
    dfactor_partial: Tensor | None,
    *,
    plan: Plan,
) -> Launch | None:
    """Fill ``dproduct [M, N]`` = factor ⊙ dY and ``dfactor_partial [plan.splits, N]`` = Σ dY ⊙ product.

    dY and the product are ``[M, N]``, the factor ``[N]``; factor and partial results are fp32. Where the
    factor needs no gradient, the product and its partial results are None.
    """
    m, n = dy.shape
    tile = plan.tile
    grid = (cdiv(n, tile.cols), plan.splits)
    return launch(_dora_grad_product_kernel, DORA_GRAD_PRODUCT, tile, grid)(
        dy_ptr=dy, product_ptr=product, factor_ptr=factor, dproduct_ptr=dproduct,
        dfactor_partial_ptr=dfactor_partial,
        M=m, N=n, stride_dym=dy.stride(0), rows_per_group=plan.part(m, tile.rows),
        HAS_PRODUCT=product is not None,
    )  # fmt: skip
