"""The two large products for Hopper and Blackwell, by tensor descriptors, in programs that take many tiles.

The hardware copies whole tiles by descriptors made on the host, so that threads compute no addresses, and as
many programs as the GPU has multiprocessors walk all tiles. What comes out is what ``lora_forward`` and
``lora_grad_x_a`` compute. Only for 16-bit dtypes, aligned rows and no empty matrix: the plan offers no such
tile elsewhere.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_kernels.kernel import Kernel
from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.backward import add_ds_a, grad_a_tile, start_grad_x
from fastlora_kernels.lora.grad_x_a import grad_a_position
from fastlora_kernels.lora.kernels import LORA_FORWARD, LORA_GRAD_X_A, grad_a_part
from fastlora_kernels.primitives import add_s_b, block_range, grouped_tile_at, load_vector
from fastlora_kernels.tile import Plan, Tile, cdiv


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
        acc = add_s_b(acc, s_ptr, lora_b_ptr, offs_m, offs_n, M, N, R, BLOCK_R)
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
) -> Launch | None:
    """Fill ``y [M, N]`` = x·Wᵀ + bias + S·Bᵀ from x ``[M, K]``, W ``[N, K]``, S ``[M, R]`` and B ``[N, R]``.

    The bias ``[N]`` may be None; ``multiprocessors`` is how many programs run at most. Addresses of x, weight
    and y are multiples of 16 bytes, and so are their row strides.
    """
    (m, k), (n, r) = x.shape, lora_b.shape
    tile = plan.tile
    tiles = cdiv(m, tile.rows) * cdiv(n, tile.cols)
    return launch(_lora_forward_persistent_kernel, LORA_FORWARD, tile, (min(tiles, multiprocessors),))(
        **_descriptors(LORA_FORWARD, tile, x_desc=x, weight_desc=weight, y_desc=y),
        bias_ptr=bias, s_ptr=s, lora_b_ptr=lora_b,
        M=m, N=n, K=k, R=r, HAS_BIAS=bias is not None,
    )  # fmt: skip


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

            acc = start_grad_x(
                ds_ptr=ds_ptr, lora_a_ptr=lora_a_ptr, mask_ptr=mask_ptr, pid_k=pid_k, offs_m=offs_m,
                offs_k=offs_k, M=M, K=K, R=R, HAS_DROPOUT=HAS_DROPOUT, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K,
                BLOCK_R=BLOCK_R,
            )  # fmt: skip
            for n in range(0, N, BLOCK_N):
                dy_tile = dy_desc.load([pid_m * BLOCK_M, n])
                w_tile = weight_desc.load([n, pid_k * BLOCK_K])
                acc = tl.dot(dy_tile, w_tile, acc)
            if not HAS_DROPOUT:
                acc = add_ds_a(acc, ds_ptr, lora_a_ptr, offs_m, offs_k, M, K, R, BLOCK_R)
            _store_halves(dx_desc, acc, pid_m * BLOCK_M, pid_k * BLOCK_K, BLOCK_M, BLOCK_K)
        else:
            pid_k, group, pid_r = grad_a_position(tile - dx_tiles, K, R, BLOCK_K_A, BLOCK_R)
            grad_a_tile(
                pid_k=pid_k, group=group, pid_r=pid_r, x_ptr=x_ptr, ds_ptr=ds_ptr, mask_ptr=mask_ptr,
                da_partial_ptr=da_partial_ptr, M=M, K=K, R=R, stride_xm=stride_xm,
                rows_per_group=rows_per_group, HAS_DROPOUT=HAS_DROPOUT, BLOCK_M=BLOCK_M_A,
                BLOCK_K=BLOCK_K_A, BLOCK_R=BLOCK_R,
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
) -> Launch | None:
    """Fill ``dx [M, K]`` = dY·W + mask ⊙ (dS·A) and ``da_partial [plan.splits, R, K]`` = dSᵀ·(mask ⊙ x).

    dY is ``[M, N]``, W ``[N, K]``, dS ``[M, R]``, A ``[R, K]`` and x ``[M, K]``; the packed mask is
    ``[M, ⌈K/32⌉]`` (int32), None without dropout. The partial results are fp32; ``multiprocessors`` is how
    many programs run at most. Addresses of dY, weight and dX are multiples of 16 bytes, and so are their row
    strides.
    """
    (m, n), (r, k) = dy.shape, lora_a.shape
    tile = plan.tile
    part = grad_a_part(tile)
    da_tiles = cdiv(k, part.cols) * plan.splits * cdiv(r, part.rank)
    tiles = cdiv(m, tile.rows) * cdiv(k, tile.cols) + da_tiles
    return launch(_lora_grad_x_a_persistent_kernel, LORA_GRAD_X_A, tile, (min(tiles, multiprocessors),))(
        **_descriptors(LORA_GRAD_X_A, tile, dy_desc=dy, weight_desc=weight, dx_desc=dx),
        ds_ptr=ds, lora_a_ptr=lora_a, mask_ptr=mask, x_ptr=x, da_partial_ptr=da_partial,
        M=m, N=n, K=k, R=r, stride_xm=x.stride(0), rows_per_group=plan.part(m, part.rows), da_tiles=da_tiles,
        HAS_DROPOUT=mask is not None,
    )  # fmt: skip


def _descriptors(kernel: Kernel, tile: Tile, **matrices: Tensor) -> dict[str, TensorDescriptor]:
    """Made on the host and passed by value: no memory on the GPU is taken for them."""
    assert kernel.descriptors is not None
    blocks = kernel.descriptors(tile)
    return {
        # a single row may have any stride, which a descriptor would refuse
        name: TensorDescriptor(
            matrix, [*matrix.shape], [max(matrix.stride(0), matrix.shape[1]), 1], [*blocks[name]]
        )
        for name, matrix in matrices.items()
    }
