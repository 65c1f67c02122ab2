"""Gradients of the LoRA linear layer: dS and dB from one read of dY, then dX, then dA."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.kernels import LORA_GRAD_A, LORA_GRAD_S_B, LORA_GRAD_X
from fastlora_kernels.primitives import (
    MASK_WORD_BITS,
    block_range,
    grouped_tile,
    load_keep_words,
    load_tile,
    load_transposed,
    store_tile,
    unpack_keep,
    zero_dropped,
)
from fastlora_kernels.tile import Plan, cdiv

_WORD_BITS = tl.constexpr(MASK_WORD_BITS)


@triton.jit
def _lora_grad_s_b_kernel(
    dy_ptr,  # (M, N)
    s_ptr,  # (M, R)
    lora_b_ptr,  # (N, R)
    ds_partial_ptr,  # (N tiles, M, R)
    db_partial_ptr,  # (row groups, N, R)
    M,
    N,
    R,
    stride_dym,
    rows_per_group,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """ds_partial[n tile] = scale · dY·B and db_partial[row group] = dYᵀ·S from one read of dY, in fp32.

    Summing both over their first dimension is the second, deterministic step.
    """
    pid_n, group = tl.program_id(0), tl.program_id(1)
    offs_n = block_range(pid_n, BLOCK_N)
    offs_r = block_range(tl.program_id(2), BLOCK_R)
    ds_ptr = ds_partial_ptr + pid_n.to(tl.int64) * M * R
    db_ptr = db_partial_ptr + group.to(tl.int64) * N * R
    b_tile = load_tile(lora_b_ptr, offs_n, offs_r, R, N, R).to(dy_ptr.dtype.element_ty)

    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for m in range(group * rows_per_group, min(M, (group + 1) * rows_per_group), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        dy_transposed = load_transposed(dy_ptr, offs_m, offs_n, stride_dym, M, N)
        s_tile = load_tile(s_ptr, offs_m, offs_r, R, M, R)
        db = tl.dot(dy_transposed, s_tile, db, input_precision="ieee")
        ds = tl.dot(tl.trans(dy_transposed), b_tile, input_precision="ieee")
        store_tile(ds_ptr, ds * scale, offs_m, offs_r, R, M, R)
    store_tile(db_ptr, db, offs_n, offs_r, R, N, R)


def lora_grad_s_b(
    dy: Tensor,
    s: Tensor,
    lora_b: Tensor,
    ds_partial: Tensor,
    db_partial: Tensor,
    *,
    scale: float,
    plan: Plan,
) -> Launch | None:
    """Fill ``ds_partial [N tiles, M, R]`` = scale · dY·B and ``db_partial [plan.splits, N, R]`` = dYᵀ·S.

    dY is ``[M, N]``, S ``[M, R]`` and B ``[N, R]``; an N tile is ``plan.tile.cols`` wide. Both results are
    fp32.
    """
    (m, n), r = dy.shape, lora_b.shape[1]
    tile = plan.tile
    grid = (cdiv(n, tile.cols), plan.splits, cdiv(r, tile.rank))
    return launch(_lora_grad_s_b_kernel, LORA_GRAD_S_B, tile, grid)(
        dy_ptr=dy, s_ptr=s, lora_b_ptr=lora_b, ds_partial_ptr=ds_partial, db_partial_ptr=db_partial,
        M=m, N=n, R=r, stride_dym=dy.stride(0), rows_per_group=plan.part(m, tile.rows),
        scale=scale,
    )  # fmt: skip


@triton.jit
def add_ds_a(acc, ds_ptr, lora_a_ptr, offs_m, offs_k, M, K, R, BLOCK_R: tl.constexpr):
    """acc + dS·A, BLOCK_R ranks at a time so that any rank fits."""
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        ds_tile = load_tile(ds_ptr, offs_m, offs_r, R, M, R)
        a_tile = load_tile(lora_a_ptr, offs_r, offs_k, K, R, K).to(ds_tile.dtype)
        acc = tl.dot(ds_tile, a_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def add_masked_ds_a(
    acc, ds_ptr, lora_a_ptr, mask_ptr, pid_k, offs_m, offs_k, M, K, R,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + mask ⊙ (dS·A). A dropped element keeps what it had: no sum of its own needs registers."""
    product = add_ds_a(acc, ds_ptr, lora_a_ptr, offs_m, offs_k, M, K, R, BLOCK_R)
    words = block_range(pid_k, BLOCK_K // _WORD_BITS)
    packed = load_keep_words(mask_ptr, offs_m, words, tl.cdiv(K, _WORD_BITS), M)
    return tl.where(unpack_keep(packed, BLOCK_M, BLOCK_K), product, acc)


@triton.jit
def start_grad_x(
    ds_ptr, lora_a_ptr, mask_ptr, pid_k, offs_m, offs_k, M, K, R,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The accumulator of dX before dY·W: mask ⊙ (dS·A) with dropout, else zeros, to which dS·A is added last.

    Masking after the main loop would keep a second accumulator alive through it.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    if HAS_DROPOUT:
        acc = add_masked_ds_a(
            acc, ds_ptr, lora_a_ptr, mask_ptr, pid_k, offs_m, offs_k, M, K, R, BLOCK_M, BLOCK_K, BLOCK_R
        )
    return acc


@triton.jit
def add_dy_w(acc, dy_ptr, weight_ptr, offs_m, offs_k, M, N, K, stride_dym, stride_wn, BLOCK_N: tl.constexpr):
    """acc + dY·W, the main loop of dX."""
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        dy_tile = load_tile(dy_ptr, offs_m, offs_n, stride_dym, M, N)
        w_tile = load_tile(weight_ptr, offs_n, offs_k, stride_wn, N, K)
        acc = tl.dot(dy_tile, w_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def grad_x_tile(
    pid_m, pid_k, dy_ptr, weight_ptr, ds_ptr, lora_a_ptr, mask_ptr, dx_ptr, M, N, K, R, stride_dym, stride_wn,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of dX = dY·W + mask ⊙ (dS·A)."""
    offs_m = block_range(pid_m, BLOCK_M)
    offs_k = block_range(pid_k, BLOCK_K)

    acc = start_grad_x(
        ds_ptr=ds_ptr, lora_a_ptr=lora_a_ptr, mask_ptr=mask_ptr, pid_k=pid_k, offs_m=offs_m, offs_k=offs_k,
        M=M, K=K, R=R, HAS_DROPOUT=HAS_DROPOUT, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    acc = add_dy_w(acc, dy_ptr, weight_ptr, offs_m, offs_k, M, N, K, stride_dym, stride_wn, BLOCK_N)
    if not HAS_DROPOUT:
        acc = add_ds_a(acc, ds_ptr, lora_a_ptr, offs_m, offs_k, M, K, R, BLOCK_R)
    store_tile(dx_ptr, acc, offs_m, offs_k, K, M, K)


@triton.jit
def _lora_grad_x_kernel(
    dy_ptr,  # (M, N)
    weight_ptr,  # (N, K)
    ds_ptr,  # (M, R)
    lora_a_ptr,  # (R, K)
    mask_ptr,  # (M, K / 32)
    dx_ptr,  # (M, K)
    M,
    N,
    K,
    R,
    stride_dym,
    stride_wn,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dX = dY·W + mask ⊙ (dS·A), accumulated in fp32; dS already carries alpha / (r · (1 - p)).

    Without HAS_DROPOUT mask_ptr is absent.
    """
    pid_m, pid_k = grouped_tile(M, K, BLOCK_M, BLOCK_K, GROUP)
    grad_x_tile(
        pid_m=pid_m, pid_k=pid_k, dy_ptr=dy_ptr, weight_ptr=weight_ptr, ds_ptr=ds_ptr, lora_a_ptr=lora_a_ptr,
        mask_ptr=mask_ptr, dx_ptr=dx_ptr, M=M, N=N, K=K, R=R, stride_dym=stride_dym, stride_wn=stride_wn,
        HAS_DROPOUT=HAS_DROPOUT, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
    )  # fmt: skip


def lora_grad_x(
    dy: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, mask: Tensor | None, dx: Tensor, *, plan: Plan
) -> Launch | None:
    """Fill ``dx [M, K]`` = dY·W + mask ⊙ (dS·A).

    dY is ``[M, N]``, W ``[N, K]``, dS ``[M, R]`` and A ``[R, K]``; the packed mask is ``[M, ⌈K/32⌉]``
    (int32), None without dropout.
    """
    (m, n), (r, k) = dy.shape, lora_a.shape
    tile = plan.tile
    programs = cdiv(m, tile.rows) * cdiv(k, tile.cols)
    return launch(_lora_grad_x_kernel, LORA_GRAD_X, tile, (programs,))(
        dy_ptr=dy, weight_ptr=weight, ds_ptr=ds, lora_a_ptr=lora_a, mask_ptr=mask, dx_ptr=dx,
        M=m, N=n, K=k, R=r, stride_dym=dy.stride(0), stride_wn=weight.stride(0),
        HAS_DROPOUT=mask is not None,
    )  # fmt: skip


@triton.jit
def grad_a_tile(
    pid_k, group, pid_r, x_ptr, ds_ptr, mask_ptr, da_partial_ptr, M, K, R, stride_xm, rows_per_group,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of da_partial[group] = dSᵀ·(mask ⊙ x).

    Without dropout computed as its transpose, xᵀ·dS: matrix instructions want the long axis (K, not the rank)
    first. A masked x comes out of registers, and Hopper would serialise its long-axis instruction on that.
    """
    offs_k = block_range(pid_k, BLOCK_K)
    offs_r = block_range(pid_r, BLOCK_R)
    da_ptr = da_partial_ptr + group.to(tl.int64) * R * K
    words = block_range(pid_k, BLOCK_K // _WORD_BITS)

    da = tl.zeros((BLOCK_R, BLOCK_K) if HAS_DROPOUT else (BLOCK_K, BLOCK_R), dtype=tl.float32)
    for m in range(group * rows_per_group, min(M, (group + 1) * rows_per_group), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        ds_tile = load_tile(ds_ptr, offs_m, offs_r, R, M, R)
        if HAS_DROPOUT:
            x_tile = load_tile(x_ptr, offs_m, offs_k, stride_xm, M, K)
            packed = load_keep_words(mask_ptr, offs_m, words, tl.cdiv(K, _WORD_BITS), M)
            x_tile = zero_dropped(x_tile, packed, BLOCK_M, BLOCK_K)
            da = tl.dot(tl.trans(ds_tile), x_tile, da, input_precision="ieee")
        else:
            x_transposed = load_transposed(x_ptr, offs_m, offs_k, stride_xm, M, K)
            da = tl.dot(x_transposed, ds_tile, da, input_precision="ieee")
    store_tile(da_ptr, da if HAS_DROPOUT else tl.trans(da), offs_r, offs_k, K, R, K)


@triton.jit
def _lora_grad_a_kernel(
    x_ptr,  # (M, K)
    ds_ptr,  # (M, R)
    mask_ptr,  # (M, K / 32)
    da_partial_ptr,  # (row groups, R, K)
    M,
    K,
    R,
    stride_xm,
    rows_per_group,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """da_partial[row group] = dSᵀ·(mask ⊙ x), accumulated in fp32. Without HAS_DROPOUT mask_ptr is absent."""
    pid_k, group, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    grad_a_tile(
        pid_k=pid_k, group=group, pid_r=pid_r, x_ptr=x_ptr, ds_ptr=ds_ptr, mask_ptr=mask_ptr,
        da_partial_ptr=da_partial_ptr, M=M, K=K, R=R, stride_xm=stride_xm, rows_per_group=rows_per_group,
        HAS_DROPOUT=HAS_DROPOUT, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
    )  # fmt: skip


def lora_grad_a(
    x: Tensor, ds: Tensor, mask: Tensor | None, da_partial: Tensor, *, plan: Plan
) -> Launch | None:
    """Fill ``da_partial [plan.splits, R, K]`` (fp32) = dSᵀ·(mask ⊙ x) from x ``[M, K]`` and dS ``[M, R]``.

    The packed mask is ``[M, ⌈K/32⌉]`` (int32), None without dropout.
    """
    (m, k), r = x.shape, ds.shape[1]
    tile = plan.tile
    grid = (cdiv(k, tile.cols), plan.splits, cdiv(r, tile.rank))
    return launch(_lora_grad_a_kernel, LORA_GRAD_A, tile, grid)(
        x_ptr=x, ds_ptr=ds, mask_ptr=mask, da_partial_ptr=da_partial,
        M=m, K=k, R=r, stride_xm=x.stride(0), rows_per_group=plan.part(m, tile.rows),
        HAS_DROPOUT=mask is not None,
    )  # fmt: skip
