"""dX of two or three layers that share their input, in one launch: written once, never read back."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.backward import add_ds_a, add_dy_w, add_masked_ds_a, start_grad_x
from fastlora_kernels.primitives import block_range, grouped_tile, store_tile
from fastlora_kernels.shared.kernels import MOST_LAYERS, SHARED_GRAD_X
from fastlora_kernels.tile import Plan, cdiv

# tensors that are read of each layer
TENSORS_PER_LAYER = 5


# more arguments than other kernels have: all that a layer brings, three times
@triton.jit
def _shared_grad_x_kernel(
    dx_ptr,  # (M, K)
    dy_0_ptr,  # (M, N_0)
    weight_0_ptr,  # (N_0, K)
    ds_0_ptr,  # (M, R_0)
    lora_a_0_ptr,  # (R_0, K)
    mask_0_ptr,  # (M, K / 32)
    dy_1_ptr,  # (M, N_1)
    weight_1_ptr,  # (N_1, K)
    ds_1_ptr,  # (M, R_1)
    lora_a_1_ptr,  # (R_1, K)
    mask_1_ptr,  # (M, K / 32)
    dy_2_ptr,  # (M, N_2)
    weight_2_ptr,  # (N_2, K)
    ds_2_ptr,  # (M, R_2)
    lora_a_2_ptr,  # (R_2, K)
    mask_2_ptr,  # (M, K / 32)
    M,
    K,
    N_0,
    N_1,
    N_2,
    R_0,
    R_1,
    R_2,
    stride_dym_0,
    stride_dym_1,
    stride_dym_2,
    stride_wn_0,
    stride_wn_1,
    stride_wn_2,
    HAS_DROPOUT: tl.constexpr,
    HAS_THIRD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dX = Σ_i dY_i·W_i + mask_i ⊙ (dS_i·A_i), accumulated in fp32 in the order of the layers.

    dS_i already carries alpha_i / (r_i · (1 - p)). Without HAS_DROPOUT masks are absent, without HAS_THIRD
    all of the third layer.
    """
    pid_m, pid_k = grouped_tile(M, K, BLOCK_M, BLOCK_K, GROUP)
    offs_m = block_range(pid_m, BLOCK_M)
    offs_k = block_range(pid_k, BLOCK_K)

    acc = start_grad_x(
        ds_0_ptr, lora_a_0_ptr, mask_0_ptr, pid_k, offs_m, offs_k, M, K, R_0,
        HAS_DROPOUT, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if HAS_DROPOUT:
        acc = add_masked_ds_a(
            acc, ds_1_ptr, lora_a_1_ptr, mask_1_ptr, pid_k, offs_m, offs_k, M, K, R_1,
            BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        if HAS_THIRD:
            acc = add_masked_ds_a(
                acc, ds_2_ptr, lora_a_2_ptr, mask_2_ptr, pid_k, offs_m, offs_k, M, K, R_2,
                BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip
    acc = add_dy_w(acc, dy_0_ptr, weight_0_ptr, offs_m, offs_k, M, N_0, K, stride_dym_0, stride_wn_0, BLOCK_N)
    acc = add_dy_w(acc, dy_1_ptr, weight_1_ptr, offs_m, offs_k, M, N_1, K, stride_dym_1, stride_wn_1, BLOCK_N)
    if HAS_THIRD:
        acc = add_dy_w(
            acc, dy_2_ptr, weight_2_ptr, offs_m, offs_k, M, N_2, K, stride_dym_2, stride_wn_2, BLOCK_N
        )
    if not HAS_DROPOUT:
        acc = add_ds_a(acc, ds_0_ptr, lora_a_0_ptr, offs_m, offs_k, M, K, R_0, BLOCK_R)
        acc = add_ds_a(acc, ds_1_ptr, lora_a_1_ptr, offs_m, offs_k, M, K, R_1, BLOCK_R)
        if HAS_THIRD:
            acc = add_ds_a(acc, ds_2_ptr, lora_a_2_ptr, offs_m, offs_k, M, K, R_2, BLOCK_R)
    store_tile(dx_ptr, acc, offs_m, offs_k, K, M, K)


def shared_grad_x(dx: Tensor, *tensors: Tensor | None, plan: Plan) -> Launch | None:
    """Fill ``dx [M, K]`` = Σ dY·W + mask ⊙ (dS·A) over two or three layers.

    ``tensors`` are dY ``[M, N]``, W ``[N, K]``, dS ``[M, R]``, A ``[R, K]`` and the packed mask
    ``[M, ⌈K/32⌉]`` (int32) of one layer after the other, None for a third that isn't there. Masks are None
    without dropout.
    """
    (m, k), tile = dx.shape, plan.tile
    layers = [tensors[i * TENSORS_PER_LAYER :][:TENSORS_PER_LAYER] for i in range(MOST_LAYERS)]
    arguments = {name: value for i, layer in enumerate(layers) for name, value in _named(i, *layer).items()}
    programs = cdiv(m, tile.rows) * cdiv(k, tile.cols)
    return launch(_shared_grad_x_kernel, SHARED_GRAD_X, tile, (programs,))(
        dx_ptr=dx, M=m, K=k, **arguments,
        HAS_DROPOUT=tensors[TENSORS_PER_LAYER - 1] is not None, HAS_THIRD=layers[-1][0] is not None,
    )  # fmt: skip


def _named(i: int, *tensors: Tensor | None) -> dict[str, Tensor | int | None]:
    """The arguments of layer ``i`` by their names in the kernel; sizes and strides of an absent one are 0."""
    dy, weight, ds, lora_a, mask = tensors
    n = r = stride_dym = stride_wn = 0
    if dy is not None and weight is not None and ds is not None:
        n, r, stride_dym, stride_wn = weight.shape[0], ds.shape[1], dy.stride(0), weight.stride(0)
    return {
        f"dy_{i}_ptr": dy, f"weight_{i}_ptr": weight, f"ds_{i}_ptr": ds, f"lora_a_{i}_ptr": lora_a,
        f"mask_{i}_ptr": mask,
        f"N_{i}": n, f"R_{i}": r, f"stride_dym_{i}": stride_dym, f"stride_wn_{i}": stride_wn,
    }  # fmt: skip
