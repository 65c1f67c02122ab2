"""S = scale · dropout(x)·Aᵀ, drawing the dropout mask on the way."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.kernels import LORA_DOWN
from fastlora_kernels.primitives import (
    MASK_WORD_BITS,
    block_range,
    draw_keep_words,
    draw_low_keep,
    load_tile,
    store_tile,
    zero_dropped,
)
from fastlora_kernels.tile import Plan, cdiv

_WORD_BITS = tl.constexpr(MASK_WORD_BITS)


@triton.jit
def add_x_a(
    acc, x_tile, lora_a_ptr, mask_ptr, seed, low_keep, drop_threshold, k, offs_m, offs_r, M, K, R,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + (mask ⊙ x)·Aᵀ over BLOCK_K columns from k on; programs of the first ranks store the mask."""
    if HAS_DROPOUT:
        words_per_row = tl.cdiv(K, _WORD_BITS)
        words = k // _WORD_BITS + tl.arange(0, BLOCK_K // _WORD_BITS)
        packed = draw_keep_words(seed, offs_m, words, words_per_row, low_keep, drop_threshold)
        if tl.program_id(2) == 0:
            store_tile(mask_ptr, packed, offs_m, words, words_per_row, M, words_per_row)
        x_tile = zero_dropped(x_tile, packed, BLOCK_M, BLOCK_K)
    a_tile = load_tile(lora_a_ptr, offs_r, k + tl.arange(0, BLOCK_K), K, R, K).to(x_tile.dtype)
    return tl.dot(x_tile, tl.trans(a_tile), acc, input_precision="ieee")


# a threshold of 1 would arrive as a constant, which has no type to shift
@triton.jit(do_not_specialize=["drop_threshold"])
def _lora_down_kernel(
    x_ptr,  # (M, K)
    lora_a_ptr,  # (R, K)
    seed_ptr,  # (1,)
    mask_ptr,  # (M, K / 32)
    s_partial_ptr,  # (splits, M, R)
    M,
    K,
    R,
    stride_xm,
    k_per_split,
    drop_threshold,
    scale,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s_partial[split] = scale · (mask ⊙ x)·Aᵀ over the split's part of K, accumulated in fp32.

    With HAS_DROPOUT the packed mask is drawn from the seed and stored; without, seed_ptr and mask_ptr are
    absent. scale carries alpha / r and dropout's 1 / (1 - p), so that neither is ever rounded to 16 bits.
    """
    split = tl.program_id(1)
    offs_m = block_range(tl.program_id(0), BLOCK_M)
    offs_r = block_range(tl.program_id(2), BLOCK_R)
    k_end = min(K, (split + 1) * k_per_split)
    words_per_row = tl.cdiv(K, _WORD_BITS)
    seed, low_keep = 0, 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        low_keep = draw_low_keep(seed, offs_m, words_per_row, drop_threshold)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(split * k_per_split, k_end, BLOCK_K):
        x_tile = load_tile(x_ptr, offs_m, k + tl.arange(0, BLOCK_K), stride_xm, M, K)
        acc = add_x_a(
            acc, x_tile, lora_a_ptr, mask_ptr, seed, low_keep, drop_threshold, k, offs_m, offs_r,
            M, K, R, HAS_DROPOUT, BLOCK_M, BLOCK_K,
        )  # fmt: skip

    s_ptr = s_partial_ptr + split.to(tl.int64) * M * R
    store_tile(s_ptr, acc * scale, offs_m, offs_r, R, M, R)


def lora_down(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    mask: Tensor | None,
    s_partial: Tensor,
    *,
    drop_threshold: int,
    scale: float,
    plan: Plan,
) -> Launch | None:
    """Fill ``s_partial [plan.splits, M, R]`` = scale · (mask ⊙ x)·Aᵀ from x ``[M, K]`` and A ``[R, K]``.

    With a seed ``[1]`` (int64), the packed ``mask [M, ⌈K/32⌉]`` (int32) is drawn: an element is kept where 16
    random bits are at least ``drop_threshold``. Without, both are None. The partial results are fp32 where
    there are several.
    """
    (m, k), r = x.shape, lora_a.shape[0]
    tile = plan.tile
    grid = (cdiv(m, tile.rows), plan.splits, cdiv(r, tile.rank))
    return launch(_lora_down_kernel, LORA_DOWN, tile, grid)(
        x_ptr=x, lora_a_ptr=lora_a, seed_ptr=seed, mask_ptr=mask, s_partial_ptr=s_partial,
        M=m, K=k, R=r, stride_xm=x.stride(0), k_per_split=plan.part(k, tile.depth),
        drop_threshold=drop_threshold, scale=scale, HAS_DROPOUT=seed is not None,
    )  # fmt: skip
