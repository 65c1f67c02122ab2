"""Kernels that lay the primitives of dropout open to tests."""

import triton
import triton.language as tl

from fastlora_kernels.primitives import draw_keep_words, draw_low_keep, random_words


@triton.jit
def draw_kernel(
    seed_ptr,
    packed_ptr,
    first_row,
    words_per_row,
    drop_threshold,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """packed [ROWS, WORDS]: what draw_keep_words makes of consecutive rows."""
    rows, words = tl.arange(0, ROWS), tl.arange(0, WORDS)
    seed, rows_drawn = tl.load(seed_ptr), first_row + rows
    low_keep = draw_low_keep(seed, rows_drawn, words_per_row, drop_threshold)
    packed = draw_keep_words(seed, rows_drawn, words, words_per_row, low_keep, drop_threshold)
    tl.store(packed_ptr + rows[:, None] * WORDS + words[None, :], packed)


@triton.jit
def own_kernel(
    seed_ptr,
    packed_ptr,
    low_keep,
    words_per_row,
    drop_threshold,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """packed [ROWS, WORDS]: what draw_keep_words makes where the row's digits all say low_keep, 0 or -1."""
    rows, words = tl.arange(0, ROWS), tl.arange(0, WORDS)
    said = (rows[:, None] * 0 + low_keep).to(tl.uint32, bitcast=True)
    packed = draw_keep_words(tl.load(seed_ptr), rows, words, words_per_row, said, drop_threshold)
    tl.store(packed_ptr + rows[:, None] * WORDS + words[None, :], packed)


@triton.jit
def words_kernel(seed_ptr, counter_ptr, ours_ptr, triton_ptr, SIZE: tl.constexpr):
    """Four words for every counter [SIZE], ours and Triton's, [4, SIZE] each."""
    offs = tl.arange(0, SIZE)
    seed, counter = tl.load(seed_ptr), tl.load(counter_ptr + offs)
    ours, theirs = random_words(seed, counter), tl.randint4x(seed, counter, 7)
    for i in tl.static_range(4):
        tl.store(ours_ptr + i * SIZE + offs, ours[i].to(tl.int32, bitcast=True))
        tl.store(triton_ptr + i * SIZE + offs, theirs[i].to(tl.int32, bitcast=True))
