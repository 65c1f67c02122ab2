"""The two large products for Hopper and Blackwell, by tensor descriptors, in programs that take many tiles.

The hardware copies whole tiles by descriptors made on the host, so that threads compute no addresses, and as
many programs as the GPU has multiprocessors walk all tiles. What comes out is what ``lora_forward`` and
``lora_grad_x_a`` compute. Only for 16-bit dtypes, aligned rows and no empty matrix: the plan offers no such
tile elsewhere.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_kernels.choose.plan import grad_a_part
from fastlora_kernels.lora import backward, forward
from fastlora_kernels.lora.backward import grad_a_tile, masked_low_rank
from fastlora_kernels.lora.grad_x_a import grad_a_position
from fastlora_kernels.primitives import TILES_PER_GROUP, block_range, grouped_tile_at, load_vector
from fastlora_kernels.tile import Plan, Tile, cdiv

_add_s_b = forward.add_low_rank
_add_ds_a = backward.add_low_rank


def forward_blocks(tile: Tile) -> dict[str, tuple[int, int]]:
    """What each descriptor of ``lora_forward_persistent`` copies at a time."""
    return {
        "x_desc": (tile.rows, tile.depth),
        "weight_desc": (tile.cols, tile.depth),
        "y_desc": (tile.rows, tile.cols // 2),
    }


def grad_x_blocks(tile: Tile) -> dict[str, tuple[int, int]]:
    """What each descriptor of ``lora_grad_x_a_persistent`` copies at a time."""
    return {
        "dy_desc": (tile.rows, tile.depth),
        "weight_desc": (tile.depth, tile.cols),
        "dx_desc": (tile.rows, tile.cols // 2),
    }


@triton.jit
def _store_halves(desc, tile, row, col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Store a tile half its width at a time: on its way it takes shared memory from the pipeline."""
    HALF: tl.constexpr = BLOCK_COLS // 2
    left, right = tl.split(tl.permute(tl.reshape(tile, (BLOCK_ROWS, 2, HALF)), (0, 2, 1)))
    desc.store([row, col], left.to(desc.dtype))
    desc.store([row, col + HALF], right.to(desc.dtype))


@triton.jit
def _lora_forward_persistent_kernel(
    x_desc,  # (M, K)
    weight_desc,  # (N, K)
    bias_ptr,  # (N,)
    s_ptr,  # (M, R)
    lora_b_ptr,  # (N, R)
    y_desc,  # (M, N)
    M,
    N,
    K,
    R,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = bias + x·Wᵀ + S·Bᵀ, accumulated in fp32; S already carries alpha / r. bias_ptr may be absent.

    The bias starts the accumulator: added at the end it takes registers that Blackwell has not.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False):
        pid_m, pid_n = grouped_tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        offs_m = block_range(pid_m, BLOCK_M)
        offs_n = block_range(pid_n, BLOCK_N)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if HAS_BIAS:
            acc += load_vector(bias_ptr, offs_n, N)[None, :]
        for k in range(0, K, BLOCK_K):
            x_tile = x_desc.load([pid_m * BLOCK_M, k])
            w_tile = weight_desc.load([pid_n * BLOCK_N, k])
            acc = tl.dot(x_tile, tl.trans(w_tile), acc)
        acc = _add_s_b(acc, s_ptr, lora_b_ptr, offs_m, offs_n, M, N, R, BLOCK_R)
        _store_halves(y_desc, acc, pid_m * BLOCK_M, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)


def lora_forward_persistent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    lora_b: Tensor,
    y: Tensor,
    *,
    plan: Plan,
    multiprocessors: int,
) -> None:
    """Fill ``y [M, N]`` from x ``[M, K]``, weight ``[N, K]``, S ``[M, R]`` and B ``[N, R]``.

    Addresses of x, weight and y are multiples of 16 bytes, and so are their row strides.
    """
    (m, k), (n, r) = x.shape, lora_b.shape
    tile = plan.tile
    tiles = cdiv(m, tile.rows) * cdiv(n, tile.cols)
    if tiles == 0:
        return
    _lora_forward_persistent_kernel[(min(tiles, multiprocessors),)](
        **_descriptors({"x_desc": x, "weight_desc": weight, "y_desc": y}, forward_blocks(tile)),
        bias_ptr=bias,
        s_ptr=s,
        lora_b_ptr=lora_b,
        M=m,
        N=n,
        K=k,
        R=r,
        HAS_BIAS=bias is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.depth,
        BLOCK_R=tile.rank,
        GROUP=TILES_PER_GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _lora_grad_x_a_persistent_kernel(
    dy_desc,  # (M, N)
    weight_desc,  # (N, K)
    ds_ptr,  # (M, R)
    lora_a_ptr,  # (R, K)
    mask_ptr,  # (M, K / 32)
    x_ptr,  # (M, K)
    dx_desc,  # (M, K)
    da_partial_ptr,  # (row groups, R, K)
    M,
    N,
    K,
    R,
    stride_xm,
    rows_per_group,
    da_tiles,
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

    The tiles of dX come first, then those of dA. Without HAS_DROPOUT mask_ptr is absent.
    """
    dx_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), dx_tiles + da_tiles, tl.num_programs(0), flatten=False):
        if tile < dx_tiles:
            pid_m, pid_k = grouped_tile_at(tile, M, K, BLOCK_M, BLOCK_K, GROUP)
            offs_m = block_range(pid_m, BLOCK_M)
            offs_k = block_range(pid_k, BLOCK_K)

            if HAS_DROPOUT:
                acc = masked_low_rank(
                    ds_ptr, lora_a_ptr, mask_ptr, pid_k, offs_m, offs_k, M, K, R, BLOCK_M, BLOCK_K, BLOCK_R
                )
            else:
                acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
            for n in range(0, N, BLOCK_N):
                dy_tile = dy_desc.load([pid_m * BLOCK_M, n])
                w_tile = weight_desc.load([n, pid_k * BLOCK_K])
                acc = tl.dot(dy_tile, w_tile, acc)
            if not HAS_DROPOUT:
                acc = _add_ds_a(acc, ds_ptr, lora_a_ptr, offs_m, offs_k, M, K, R, BLOCK_R)
            _store_halves(dx_desc, acc, pid_m * BLOCK_M, pid_k * BLOCK_K, BLOCK_M, BLOCK_K)
        else:
            pid_k, group, pid_r = grad_a_position(tile - dx_tiles, K, R, BLOCK_K_A, BLOCK_R)
            grad_a_tile(
                pid_k, group, pid_r, x_ptr, ds_ptr, mask_ptr, da_partial_ptr, M, K, R, stride_xm,
                rows_per_group, HAS_DROPOUT, BLOCK_M_A, BLOCK_K_A, BLOCK_R,
            )  # fmt: skip


def lora_grad_x_a_persistent(
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
    multiprocessors: int,
) -> None:
    """Fill ``dx [M, K]`` and ``da_partial [plan.splits, R, K]`` like ``lora_grad_x_a``.

    Addresses of dY, weight and dX are multiples of 16 bytes, and so are their row strides.
    """
    (m, n), (r, k) = dy.shape, lora_a.shape
    tile = plan.tile
    part = grad_a_part(tile)
    da_tiles = cdiv(k, part.cols) * plan.splits * cdiv(r, part.rank)
    tiles = cdiv(m, tile.rows) * cdiv(k, tile.cols) + da_tiles
    if tiles == 0:
        return
    _lora_grad_x_a_persistent_kernel[(min(tiles, multiprocessors),)](
        **_descriptors({"dy_desc": dy, "weight_desc": weight, "dx_desc": dx}, grad_x_blocks(tile)),
        ds_ptr=ds,
        lora_a_ptr=lora_a,
        mask_ptr=mask,
        x_ptr=x,
        da_partial_ptr=da_partial,
        M=m,
        N=n,
        K=k,
        R=r,
        stride_xm=x.stride(0),
        rows_per_group=cdiv(m, plan.splits * part.rows) * part.rows,
        da_tiles=da_tiles,
        HAS_DROPOUT=mask is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.depth,
        BLOCK_K=tile.cols,
        BLOCK_R=tile.rank,
        BLOCK_M_A=part.rows,
        BLOCK_K_A=part.cols,
        GROUP=TILES_PER_GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _descriptors(
    matrices: Mapping[str, Tensor], blocks: Mapping[str, tuple[int, int]]
) -> dict[str, TensorDescriptor]:
    """Made on the host and passed by value: no memory on the GPU is taken for them."""
    return {
        # a single row may have any stride, which a descriptor would refuse
        name: TensorDescriptor(
            matrix, [*matrix.shape], [max(matrix.stride(0), matrix.shape[1]), 1], [*blocks[name]]
        )
        for name, matrix in matrices.items()
    }
