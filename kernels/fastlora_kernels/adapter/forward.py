"""out = residual + dropout(act(h·W_dᵀ + b_d))·W_uᵀ + b_u, a narrow bottleneck in one launch, else two."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.adapter.kernels import ADAPTER_DOWN, ADAPTER_FORWARD, ADAPTER_UP
from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.primitives import (
    activate,
    block_range,
    drop_bottleneck,
    grouped_tile,
    load_tile,
    load_vector,
    store_tile,
)
from fastlora_kernels.tile import Plan, cdiv


@triton.jit
def _bottleneck(
    h_ptr,
    down_weight_ptr,
    down_bias_ptr,
    seed_ptr,
    offs_m,
    offs_d,
    M,
    H,
    D,
    stride_hm,
    drop_threshold,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tile of z = h·W_dᵀ + b_d in float32, its dropped elements marked."""
    z = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        h_tile = load_tile(h_ptr, offs_m, offs_h, stride_hm, M, H)
        w_tile = load_tile(down_weight_ptr, offs_d, offs_h, H, D, H).to(h_tile.dtype)
        z = tl.dot(h_tile, tl.trans(w_tile), z, input_precision="ieee")
    if HAS_DOWN_BIAS:
        z += load_vector(down_bias_ptr, offs_d, D)[None, :]
    if HAS_DROPOUT:
        z = drop_bottleneck(z, tl.load(seed_ptr), offs_m, offs_d, D, drop_threshold)
    return z


@triton.jit
def _add_bias_and_residual(
    acc,
    up_bias_ptr,
    residual_ptr,
    offs_m,
    offs_h,
    M,
    H,
    stride_rm,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    if HAS_UP_BIAS:
        acc += load_vector(up_bias_ptr, offs_h, H)[None, :]
    if HAS_RESIDUAL:
        acc += load_tile(residual_ptr, offs_m, offs_h, stride_rm, M, H).to(tl.float32)
    return acc


@triton.jit
def _adapter_forward_kernel(
    h_ptr,  # (M, H)
    down_weight_ptr,  # (D, H)
    down_bias_ptr,  # (D,)
    up_weight_ptr,  # (H, D)
    up_bias_ptr,  # (H,)
    residual_ptr,  # (M, H)
    seed_ptr,  # (1,)
    z_ptr,  # (M, D)
    out_ptr,  # (M, H)
    M,
    H,
    D,
    stride_hm,
    stride_rm,
    drop_threshold,
    scale,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z = h·W_dᵀ + b_d and out = residual + scale · act(z)·W_uᵀ + b_u, accumulated in fp32; D ≤ BLOCK_D.

    The biases, the residual and, without HAS_DROPOUT, the seed may be absent. Dropped elements of z are
    stored as DROPPED, where the activation is 0; scale is dropout's 1 / (1 - p). The whole bottleneck of
    BLOCK_M rows stays in registers between the two products.
    """
    offs_m = block_range(tl.program_id(0), BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    z = _bottleneck(
        h_ptr=h_ptr, down_weight_ptr=down_weight_ptr, down_bias_ptr=down_bias_ptr, seed_ptr=seed_ptr,
        offs_m=offs_m, offs_d=offs_d, M=M, H=H, D=D, stride_hm=stride_hm, drop_threshold=drop_threshold,
        HAS_DOWN_BIAS=HAS_DOWN_BIAS, HAS_DROPOUT=HAS_DROPOUT,
        BLOCK_M=BLOCK_M, BLOCK_H=BLOCK_H, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    store_tile(z_ptr, z, offs_m, offs_d, D, M, D)
    active = (activate(z, ACTIVATION) * scale).to(h_ptr.dtype.element_ty)

    for start in range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        w_tile = load_tile(up_weight_ptr, offs_h, offs_d, D, H, D).to(active.dtype)
        acc = tl.dot(active, tl.trans(w_tile), input_precision="ieee")
        acc = _add_bias_and_residual(
            acc, up_bias_ptr, residual_ptr, offs_m, offs_h, M, H, stride_rm, HAS_UP_BIAS, HAS_RESIDUAL
        )
        store_tile(out_ptr, acc, offs_m, offs_h, H, M, H)


def adapter_forward(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    z: Tensor,
    out: Tensor,
    *,
    activation: str,
    drop_threshold: int,
    scale: float,
    plan: Plan,
) -> Launch | None:
    """Fill ``z [M, D]`` = h·W_dᵀ + b_d and ``out [M, H]`` = residual + scale · act(z)·W_uᵀ + b_u at once.

    h and the residual are ``[M, H]``, W_d ``[D, H]``, W_u ``[H, D]``, the biases ``[D]`` and ``[H]``;
    residual and biases may be None. With a seed ``[1]`` (int64) elements of z are dropped where 16 random
    bits are below ``drop_threshold``, and marked. ``plan.tile.rank`` must cover D.
    """
    (m, hidden), d = h.shape, down_weight.shape[0]
    tile = plan.tile
    return launch(_adapter_forward_kernel, ADAPTER_FORWARD, tile, (cdiv(m, tile.rows),))(
        h_ptr=h, down_weight_ptr=down_weight, down_bias_ptr=down_bias, up_weight_ptr=up_weight,
        up_bias_ptr=up_bias, residual_ptr=residual, seed_ptr=seed, z_ptr=z, out_ptr=out,
        M=m, H=hidden, D=d, stride_hm=h.stride(0), stride_rm=0 if residual is None else residual.stride(0),
        drop_threshold=drop_threshold, scale=scale,
        HAS_DOWN_BIAS=down_bias is not None, HAS_UP_BIAS=up_bias is not None,
        HAS_RESIDUAL=residual is not None, HAS_DROPOUT=seed is not None, ACTIVATION=activation,
    )  # fmt: skip


@triton.jit
def _adapter_down_kernel(
    h_ptr,  # (M, H)
    down_weight_ptr,  # (D, H)
    down_bias_ptr,  # (D,)
    seed_ptr,  # (1,)
    z_ptr,  # (M, D)
    active_ptr,  # (M, D)
    M,
    H,
    D,
    stride_hm,
    drop_threshold,
    scale,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z = h·W_dᵀ + b_d and active = scale · act(z), accumulated in fp32; bias and seed may be absent."""
    offs_m = block_range(tl.program_id(0), BLOCK_M)
    offs_d = block_range(tl.program_id(1), BLOCK_D)
    z = _bottleneck(
        h_ptr=h_ptr, down_weight_ptr=down_weight_ptr, down_bias_ptr=down_bias_ptr, seed_ptr=seed_ptr,
        offs_m=offs_m, offs_d=offs_d, M=M, H=H, D=D, stride_hm=stride_hm, drop_threshold=drop_threshold,
        HAS_DOWN_BIAS=HAS_DOWN_BIAS, HAS_DROPOUT=HAS_DROPOUT,
        BLOCK_M=BLOCK_M, BLOCK_H=BLOCK_H, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    store_tile(z_ptr, z, offs_m, offs_d, D, M, D)
    store_tile(active_ptr, activate(z, ACTIVATION) * scale, offs_m, offs_d, D, M, D)


def adapter_down(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    seed: Tensor | None,
    z: Tensor,
    active: Tensor,
    *,
    activation: str,
    drop_threshold: int,
    scale: float,
    plan: Plan,
) -> Launch | None:
    """Fill ``z [M, D]`` = h·W_dᵀ + b_d and ``active [M, D]`` = scale · act(z).

    h is ``[M, H]``, W_d ``[D, H]``; the bias ``[D]`` may be None. With a seed ``[1]`` (int64) elements of z
    are dropped where 16 random bits are below ``drop_threshold``, and marked.
    """
    (m, hidden), d = h.shape, down_weight.shape[0]
    tile = plan.tile
    grid = (cdiv(m, tile.rows), cdiv(d, tile.rank))
    return launch(_adapter_down_kernel, ADAPTER_DOWN, tile, grid)(
        h_ptr=h, down_weight_ptr=down_weight, down_bias_ptr=down_bias, seed_ptr=seed, z_ptr=z,
        active_ptr=active,
        M=m, H=hidden, D=d, stride_hm=h.stride(0), drop_threshold=drop_threshold, scale=scale,
        HAS_DOWN_BIAS=down_bias is not None, HAS_DROPOUT=seed is not None, ACTIVATION=activation,
    )  # fmt: skip


@triton.jit
def _adapter_up_kernel(
    active_ptr,  # (M, D)
    up_weight_ptr,  # (H, D)
    up_bias_ptr,  # (H,)
    residual_ptr,  # (M, H)
    out_ptr,  # (M, H)
    M,
    H,
    D,
    stride_rm,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = residual + active·W_uᵀ + b_u, accumulated in fp32; residual and bias may be absent."""
    pid_m, pid_h = grouped_tile(M, H, BLOCK_M, BLOCK_H, GROUP)
    offs_m = block_range(pid_m, BLOCK_M)
    offs_h = block_range(pid_h, BLOCK_H)
    acc = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        active = load_tile(active_ptr, offs_m, offs_d, D, M, D)
        w_tile = load_tile(up_weight_ptr, offs_h, offs_d, D, H, D).to(active.dtype)
        acc = tl.dot(active, tl.trans(w_tile), acc, input_precision="ieee")
    acc = _add_bias_and_residual(
        acc, up_bias_ptr, residual_ptr, offs_m, offs_h, M, H, stride_rm, HAS_UP_BIAS, HAS_RESIDUAL
    )
    store_tile(out_ptr, acc, offs_m, offs_h, H, M, H)


def adapter_up(
    active: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    plan: Plan,
) -> Launch | None:
    """Fill ``out [M, H]`` = residual + active·W_uᵀ + b_u.

    The active bottleneck is ``[M, D]``, W_u ``[H, D]``; the bias ``[H]`` and the residual ``[M, H]`` may be
    None.
    """
    (m, d), hidden = active.shape, up_weight.shape[0]
    tile = plan.tile
    programs = cdiv(m, tile.rows) * cdiv(hidden, tile.cols)
    return launch(_adapter_up_kernel, ADAPTER_UP, tile, (programs,))(
        active_ptr=active, up_weight_ptr=up_weight, up_bias_ptr=up_bias, residual_ptr=residual, out_ptr=out,
        M=m, H=hidden, D=d, stride_rm=0 if residual is None else residual.stride(0),
        HAS_UP_BIAS=up_bias is not None, HAS_RESIDUAL=residual is not None,
    )  # fmt: skip
