"""S of two or three layers that share their input, in one launch: x is read once for all of them."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.down import add_x_a
from fastlora_kernels.primitives import MASK_WORD_BITS, block_range, draw_low_keep, load_tile, store_tile
from fastlora_kernels.shared.kernels import MOST_LAYERS, SHARED_DOWN
from fastlora_kernels.tile import Plan, cdiv

# tensors that are read or drawn of each layer
TENSORS_PER_LAYER = 3
_WORD_BITS = tl.constexpr(MASK_WORD_BITS)


# more arguments than other kernels have: all that a layer brings, three times
@triton.jit(do_not_specialize=["drop_threshold_0", "drop_threshold_1", "drop_threshold_2"])
def _shared_down_kernel(
    x_ptr,  # (M, K)
    s_partial_ptr,  # (splits, M · (R_0 + R_1 + R_2))
    lora_a_0_ptr,  # (R_0, K)
    seed_0_ptr,  # (1,)
    mask_0_ptr,  # (M, K / 32)
    lora_a_1_ptr,  # (R_1, K)
    seed_1_ptr,  # (1,)
    mask_1_ptr,  # (M, K / 32)
    lora_a_2_ptr,  # (R_2, K)
    seed_2_ptr,  # (1,)
    mask_2_ptr,  # (M, K / 32)
    M,
    K,
    R_0,
    R_1,
    R_2,
    stride_xm,
    k_per_split,
    drop_threshold_0,
    drop_threshold_1,
    drop_threshold_2,
    scale_0,
    scale_1,
    scale_2,
    HAS_DROPOUT: tl.constexpr,
    HAS_THIRD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """S_i = scale_i · (mask_i ⊙ x)·A_iᵀ over the split's part of K, accumulated in fp32; x is read once.

    With HAS_DROPOUT each layer's packed mask is drawn from its own seed and stored; without, seeds and masks
    are absent. Without HAS_THIRD all of the third layer is, and R_2 is 0. scale_i carries alpha_i / r_i and
    dropout's 1 / (1 - p_i).
    """
    split = tl.program_id(1)
    offs_m = block_range(tl.program_id(0), BLOCK_M)
    offs_r = block_range(tl.program_id(2), BLOCK_R)
    k_end = min(K, (split + 1) * k_per_split)
    words_per_row = tl.cdiv(K, _WORD_BITS)
    # what is not drawn is not read either
    seed_0, seed_1, seed_2, low_0, low_1, low_2 = 0, 0, 0, 0, 0, 0
    if HAS_DROPOUT:
        seed_0, seed_1 = tl.load(seed_0_ptr), tl.load(seed_1_ptr)
        low_0 = draw_low_keep(seed_0, offs_m, words_per_row, drop_threshold_0)
        low_1 = draw_low_keep(seed_1, offs_m, words_per_row, drop_threshold_1)
        if HAS_THIRD:
            seed_2 = tl.load(seed_2_ptr)
            low_2 = draw_low_keep(seed_2, offs_m, words_per_row, drop_threshold_2)

    acc_0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc_1 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc_2 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(split * k_per_split, k_end, BLOCK_K):
        x_tile = load_tile(x_ptr, offs_m, k + tl.arange(0, BLOCK_K), stride_xm, M, K)
        acc_0 = add_x_a(
            acc_0, x_tile, lora_a_0_ptr, mask_0_ptr, seed_0, low_0, drop_threshold_0, k, offs_m, offs_r,
            M, K, R_0, HAS_DROPOUT, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        acc_1 = add_x_a(
            acc_1, x_tile, lora_a_1_ptr, mask_1_ptr, seed_1, low_1, drop_threshold_1, k, offs_m, offs_r,
            M, K, R_1, HAS_DROPOUT, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        if HAS_THIRD:
            acc_2 = add_x_a(
                acc_2, x_tile, lora_a_2_ptr, mask_2_ptr, seed_2, low_2, drop_threshold_2, k, offs_m, offs_r,
                M, K, R_2, HAS_DROPOUT, BLOCK_M, BLOCK_K,
            )  # fmt: skip

    first = split.to(tl.int64) * (R_0 + R_1 + R_2)
    store_tile(s_partial_ptr + first * M, acc_0 * scale_0, offs_m, offs_r, R_0, M, R_0)
    store_tile(s_partial_ptr + (first + R_0) * M, acc_1 * scale_1, offs_m, offs_r, R_1, M, R_1)
    if HAS_THIRD:
        first += R_0 + R_1
        store_tile(s_partial_ptr + first * M, acc_2 * scale_2, offs_m, offs_r, R_2, M, R_2)


def shared_down(
    x: Tensor,
    s_partial: Tensor,
    *tensors: Tensor | None,
    drop_thresholds: Sequence[int],
    scales: Sequence[float],
    plan: Plan,
) -> Launch | None:
    """Fill ``s_partial [plan.splits, M · ΣR]`` with S ``[M, R]`` of two or three layers, one after the other.

    ``tensors`` are A ``[R, K]``, the seed ``[1]`` (int64) and the packed mask ``[M, ⌈K/32⌉]`` (int32) of one
    layer after the other, None for a third that isn't there. Seeds and masks are None without dropout.
    Thresholds and scales are each layer's, as :func:`~fastlora_kernels.lora.down.lora_down` takes them. The
    partial results are fp32 where there are several.
    """
    (m, k), tile = x.shape, plan.tile
    layers = [tensors[i * TENSORS_PER_LAYER :][:TENSORS_PER_LAYER] for i in range(MOST_LAYERS)]
    ranks = [0 if lora_a is None else lora_a.shape[0] for lora_a, *_ in layers]
    arguments: dict[str, Tensor | float | None] = {}
    for i, ((lora_a, seed, mask), r) in enumerate(zip(layers, ranks, strict=True)):
        threshold, scale = (drop_thresholds[i], scales[i]) if i < len(scales) else (0, 0.0)
        arguments |= {
            f"lora_a_{i}_ptr": lora_a, f"seed_{i}_ptr": seed, f"mask_{i}_ptr": mask, f"R_{i}": r,
            f"drop_threshold_{i}": threshold, f"scale_{i}": scale,
        }  # fmt: skip
    grid = (cdiv(m, tile.rows), plan.splits, cdiv(max(ranks), tile.rank))
    return launch(_shared_down_kernel, SHARED_DOWN, tile, grid)(
        x_ptr=x, s_partial_ptr=s_partial, M=m, K=k, stride_xm=x.stride(0),
        k_per_split=plan.part(k, tile.depth), **arguments,
        HAS_DROPOUT=tensors[1] is not None, HAS_THIRD=layers[-1][0] is not None,
    )  # fmt: skip
