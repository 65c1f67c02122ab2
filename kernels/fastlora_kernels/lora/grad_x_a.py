"""dX and dA in one launch: the programs of dA, bound by their one read of x, fill dX's last wave."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.backward import grad_a_tile, grad_x_tile
from fastlora_kernels.lora.kernels import LORA_GRAD_X_A, grad_a_part
from fastlora_kernels.primitives import grouped_tile
from fastlora_kernels.tile import Plan, cdiv


@triton.jit
def _lora_grad_x_a_kernel(
    dy_ptr,  # (M, N)
    weight_ptr,  # (N, K)
    ds_ptr,  # (M, R)
    lora_a_ptr,  # (R, K)
    mask_ptr,  # (M, K / 32)
    x_ptr,  # (M, K)
    dx_ptr,  # (M, K)
    da_partial_ptr,  # (row groups, R, K)
    M,
    N,
    K,
    R,
    stride_dym,
    stride_wn,
    stride_xm,
    rows_per_group,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M_A: tl.constexpr,
    BLOCK_K_A: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dX = dY·W + mask ⊙ (dS·A) and da_partial[row group] = dSᵀ·(mask ⊙ x), accumulated in fp32.

    The first programs compute a tile of dX each, the others one of dA. Without HAS_DROPOUT mask_ptr is
    absent.
    """
    pid = tl.program_id(0)
    dx_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
    if pid < dx_tiles:
        pid_m, pid_k = grouped_tile(M, K, BLOCK_M, BLOCK_K, GROUP)
        grad_x_tile(
            pid_m=pid_m, pid_k=pid_k, dy_ptr=dy_ptr, weight_ptr=weight_ptr, ds_ptr=ds_ptr,
            lora_a_ptr=lora_a_ptr, mask_ptr=mask_ptr, dx_ptr=dx_ptr, M=M, N=N, K=K, R=R,
            stride_dym=stride_dym, stride_wn=stride_wn, HAS_DROPOUT=HAS_DROPOUT, BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
        )  # fmt: skip
    else:
        pid_k, group, pid_r = grad_a_position(pid - dx_tiles, K, R, BLOCK_K_A, BLOCK_R)
        grad_a_tile(
            pid_k=pid_k, group=group, pid_r=pid_r, x_ptr=x_ptr, ds_ptr=ds_ptr, mask_ptr=mask_ptr,
            da_partial_ptr=da_partial_ptr, M=M, K=K, R=R, stride_xm=stride_xm, rows_per_group=rows_per_group,
            HAS_DROPOUT=HAS_DROPOUT, BLOCK_M=BLOCK_M_A, BLOCK_K=BLOCK_K_A, BLOCK_R=BLOCK_R,
        )  # fmt: skip


@triton.jit
def grad_a_position(pid, K, R, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """Column tile, row group and chunk of ranks of a tile of dA; the chunks, which share x, go together."""
    chunks, k_tiles = tl.cdiv(R, BLOCK_R), tl.cdiv(K, BLOCK_K)
    return (pid // chunks) % k_tiles, pid // (chunks * k_tiles), pid % chunks


def lora_grad_x_a(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    lora_a: Tensor,
    mask: Tensor | None,
    x: Tensor,
    dx: Tensor,
    da_partial: Tensor,
    *,
    plan: Plan,
) -> Launch | None:
    """Fill ``dx [M, K]`` = dY·W + mask ⊙ (dS·A) and ``da_partial [plan.splits, R, K]`` = dSᵀ·(mask ⊙ x).

    dY is ``[M, N]``, W ``[N, K]``, dS ``[M, R]``, A ``[R, K]`` and x ``[M, K]``; the packed mask is
    ``[M, ⌈K/32⌉]`` (int32), None without dropout. The partial results are fp32.
    """
    (m, n), (r, k) = dy.shape, lora_a.shape
    tile = plan.tile
    part = grad_a_part(tile)
    dx_tiles = cdiv(m, tile.rows) * cdiv(k, tile.cols)
    da_tiles = cdiv(k, part.cols) * plan.splits * cdiv(r, part.rank)
    return launch(_lora_grad_x_a_kernel, LORA_GRAD_X_A, tile, (dx_tiles + da_tiles,))(
        dy_ptr=dy, weight_ptr=weight, ds_ptr=ds, lora_a_ptr=lora_a, mask_ptr=mask, x_ptr=x, dx_ptr=dx,
        da_partial_ptr=da_partial,
        M=m, N=n, K=k, R=r, stride_dym=dy.stride(0), stride_wn=weight.stride(0), stride_xm=x.stride(0),
        rows_per_group=plan.part(m, part.rows), HAS_DROPOUT=mask is not None,
    )  # fmt: skip
