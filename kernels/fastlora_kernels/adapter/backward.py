"""Gradients of the bottleneck adapter: dz from dOut, then dh and the parameters' in a second launch."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.adapter.kernels import ADAPTER_GRAD_H_WEIGHTS, ADAPTER_GRAD_Z
from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.primitives import (
    activate,
    activation_slope,
    block_range,
    load_tile,
    load_transposed,
    store_tile,
)
from fastlora_kernels.tile import Plan, cdiv


@triton.jit
def _adapter_grad_z_kernel(
    dout_ptr,  # (M, H)
    z_ptr,  # (M, D)
    up_weight_ptr,  # (H, D)
    dz_ptr,  # (M, D)
    active_ptr,  # (M, D)
    M,
    H,
    D,
    stride_dm,
    scale,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dz = scale · (dOut·W_u) ⊙ act'(z) and active = scale · act(z), accumulated in fp32.

    Where z is marked as dropped both are exactly 0; scale is dropout's 1 / (1 - p).
    """
    offs_m = block_range(tl.program_id(0), BLOCK_M)
    offs_d = block_range(tl.program_id(1), BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        dout_tile = load_tile(dout_ptr, offs_m, offs_h, stride_dm, M, H)
        w_tile = load_tile(up_weight_ptr, offs_h, offs_d, D, H, D).to(dout_tile.dtype)
        acc = tl.dot(dout_tile, w_tile, acc, input_precision="ieee")
    z = load_tile(z_ptr, offs_m, offs_d, D, M, D).to(tl.float32)
    store_tile(dz_ptr, acc * (activation_slope(z, ACTIVATION) * scale), offs_m, offs_d, D, M, D)
    store_tile(active_ptr, activate(z, ACTIVATION) * scale, offs_m, offs_d, D, M, D)


def adapter_grad_z(
    dout: Tensor,
    z: Tensor,
    up_weight: Tensor,
    dz: Tensor,
    active: Tensor,
    *,
    activation: str,
    scale: float,
    plan: Plan,
) -> Launch | None:
    """Fill ``dz [M, D]`` = scale · (dOut·W_u) ⊙ act'(z) and ``active [M, D]`` = scale · act(z).

    dOut is ``[M, H]``, W_u ``[H, D]`` and the kept z, its dropped elements marked, ``[M, D]``; scale is
    dropout's 1 / (1 - p).
    """
    (m, hidden), d = dout.shape, z.shape[1]
    tile = plan.tile
    grid = (cdiv(m, tile.rows), cdiv(d, tile.rank))
    return launch(_adapter_grad_z_kernel, ADAPTER_GRAD_Z, tile, grid)(
        dout_ptr=dout, z_ptr=z, up_weight_ptr=up_weight, dz_ptr=dz, active_ptr=active,
        M=m, H=hidden, D=d, stride_dm=dout.stride(0), scale=scale, ACTIVATION=activation,
    )  # fmt: skip


@triton.jit
def _down_product(
    dz_ptr,
    down_weight_ptr,
    offs_m,
    offs_h,
    M,
    H,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dz·W_d, BLOCK_D at a time so that any bottleneck fits."""
    acc = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=1):
        offs_d = start + tl.arange(0, BLOCK_D)
        dz_tile = load_tile(dz_ptr, offs_m, offs_d, D, M, D)
        w_tile = load_tile(down_weight_ptr, offs_d, offs_h, H, D, H).to(dz_tile.dtype)
        acc = tl.dot(dz_tile, w_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _adapter_grad_h_weights_kernel(
    dout_ptr,  # (M, H)
    h_ptr,  # (M, H)
    dz_ptr,  # (M, D)
    active_ptr,  # (M, D)
    down_weight_ptr,  # (D, H)
    dh_ptr,  # (M, H)
    grads_partial_ptr,  # (row groups, 2·H·D + H + D)
    M,
    H,
    D,
    stride_dm,
    stride_hm,
    rows_per_group,
    HAS_DH: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dh = dz·W_d (+ dOut) and the partial gradients of all four parameters, from one read of dOut and h.

    grads_partial[row group] holds dW_u = dOutᵀ·active ``(H, D)``, dW_d = dzᵀ·h ``(D, H)``, db_u = ΣdOut
    ``(H,)`` and db_d = Σdz ``(D,)`` over the group's rows, one after the other, in fp32. D is cut into chunks
    of BLOCK_D over the grid; ONE_CHUNK says that there is but one.
    ADD_INPUT says that the residual was h itself. Without HAS_DH dh_ptr and down_weight_ptr are absent, and
    dOut is read twice.
    """
    pid_h, group, pid_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_h = block_range(pid_h, BLOCK_H)
    offs_d = block_range(pid_d, BLOCK_D)
    # both gradients with the longer axis first: matrix instructions want it so
    D_FIRST: tl.constexpr = BLOCK_D > BLOCK_H
    d_up = tl.zeros((BLOCK_D, BLOCK_H) if D_FIRST else (BLOCK_H, BLOCK_D), dtype=tl.float32)
    d_down = tl.zeros((BLOCK_D, BLOCK_H) if D_FIRST else (BLOCK_H, BLOCK_D), dtype=tl.float32)
    # a sum over rows passes through shared memory: one after the loop, not one an iteration. Where D is the
    # longer axis, a tile of dz would take too many registers beside dh; without dh a sum among the products
    # makes Hopper's wait for each other
    SUM_DZ: tl.constexpr = D_FIRST and HAS_DH
    d_up_bias = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    d_down_bias = tl.zeros((1 if SUM_DZ else BLOCK_M, BLOCK_D), dtype=tl.float32)
    if HAS_DH and ONE_CHUNK:
        w_tile = load_tile(down_weight_ptr, offs_d, offs_h, H, D, H).to(dout_ptr.dtype.element_ty)

    for m in range(group * rows_per_group, min(M, (group + 1) * rows_per_group), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        dout_tile = load_tile(dout_ptr, offs_m, offs_h, stride_dm, M, H)
        if D_FIRST:
            h_tile = load_tile(h_ptr, offs_m, offs_h, stride_hm, M, H)
            active_transposed = load_transposed(active_ptr, offs_m, offs_d, D, M, D)
            dz_transposed = load_transposed(dz_ptr, offs_m, offs_d, D, M, D)
            dz = tl.trans(dz_transposed)
            d_up = tl.dot(active_transposed, dout_tile, d_up, input_precision="ieee")
            d_down = tl.dot(dz_transposed, h_tile, d_down, input_precision="ieee")
        else:
            h_transposed = load_transposed(h_ptr, offs_m, offs_h, stride_hm, M, H)
            active = load_tile(active_ptr, offs_m, offs_d, D, M, D)
            dz = load_tile(dz_ptr, offs_m, offs_d, D, M, D)
            d_up = tl.dot(tl.trans(dout_tile), active, d_up, input_precision="ieee")
            d_down = tl.dot(h_transposed, dz, d_down, input_precision="ieee")
        dout_summed = dout_tile
        if not HAS_DH:
            # Triton keeps two buffers for what a product and a sum share, and fills one again while Hopper's
            # product, which nothing waits for without dh, still reads it
            dout_summed = load_tile(dout_ptr, offs_m, offs_h, stride_dm, tl.where(pid_d == 0, M, 0), H)
        d_up_bias += dout_summed.to(tl.float32)
        # loaded again, by the programs that store the sum: shared memory is swizzled for products alone
        dz_summed = load_tile(dz_ptr, offs_m, offs_d, D, tl.where(pid_h == 0, M, 0), D).to(tl.float32)
        d_down_bias += tl.sum(dz_summed, axis=0)[None, :] if SUM_DZ else dz_summed
        if HAS_DH and ONE_CHUNK:
            dh = tl.dot(dz, w_tile, input_precision="ieee")
            if ADD_INPUT:
                dh += dout_tile.to(tl.float32)
            store_tile(dh_ptr, dh, offs_m, offs_h, H, M, H)
        if HAS_DH and not ONE_CHUNK:  # noqa: SIM102
            # the programs of the chunks take the row tiles in turns; joined to the first `if`, this one would
            # make it a branch that the compiler can't decide
            if (m // BLOCK_M) % tl.num_programs(2) == pid_d:
                dh = _down_product(
                    dz_ptr, down_weight_ptr, offs_m, offs_h, M, H, D, BLOCK_M, BLOCK_H, BLOCK_D
                )
                if ADD_INPUT:
                    dh += dout_tile.to(tl.float32)
                store_tile(dh_ptr, dh, offs_m, offs_h, H, M, H)

    grads_ptr = grads_partial_ptr + group.to(tl.int64) * (2 * H * D + H + D)
    store_tile(grads_ptr, tl.trans(d_up) if D_FIRST else d_up, offs_h, offs_d, D, H, D)
    grads_ptr += H * D
    store_tile(grads_ptr, d_down if D_FIRST else tl.trans(d_down), offs_d, offs_h, H, D, H)
    grads_ptr += H * D
    # the first programs of each axis write the biases' gradients; a branch here would cost registers, and an
    # `&` of a block with a scalar is no mask to the interpreter of Triton 3.9
    tl.store(grads_ptr + offs_h, tl.sum(d_up_bias, axis=0), mask=offs_h < tl.where(pid_d == 0, H, 0))
    tl.store(grads_ptr + H + offs_d, tl.sum(d_down_bias, axis=0), mask=offs_d < tl.where(pid_h == 0, D, 0))


def adapter_grad_h_weights(
    dout: Tensor,
    h: Tensor,
    dz: Tensor,
    active: Tensor,
    down_weight: Tensor | None,
    dh: Tensor | None,
    grads_partial: Tensor,
    *,
    add_input: bool,
    plan: Plan,
) -> Launch | None:
    """Fill ``dh [M, H]`` = dz·W_d, unless None, and ``grads_partial [plan.splits, 2·H·D + H + D]`` (fp32).

    dOut and h are ``[M, H]``, dz and active ``[M, D]``, W_d ``[D, H]``; with ``add_input`` dOut joins dh.
    Each partial result holds dW_u ``[H, D]``, dW_d ``[D, H]``, db_u ``[H]`` and db_d ``[D]``, flattened.
    """
    (m, hidden), d = dout.shape, dz.shape[1]
    tile = plan.tile
    chunks = cdiv(d, tile.rank)
    grid = (cdiv(hidden, tile.cols), plan.splits, chunks)
    return launch(_adapter_grad_h_weights_kernel, ADAPTER_GRAD_H_WEIGHTS, tile, grid)(
        dout_ptr=dout, h_ptr=h, dz_ptr=dz, active_ptr=active,
        down_weight_ptr=down_weight, dh_ptr=dh, grads_partial_ptr=grads_partial,
        M=m, H=hidden, D=d, stride_dm=dout.stride(0), stride_hm=h.stride(0),
        rows_per_group=plan.part(m, tile.rows),
        HAS_DH=dh is not None, ADD_INPUT=add_input, ONE_CHUNK=chunks == 1,
    )  # fmt: skip
