"""Jit helpers that the kernels share: tile order, masked loads and stores, activations, dropout bits.

Tiles are addressed by ``rows`` and ``cols``, vectors of absolute indices. Every tensor has a contiguous last
dimension, so one row stride is enough, and row offsets are 64-bit because M·K may pass 2³¹ elements.
"""

import triton
import triton.language as tl

from fastlora_kernels.tile import MASK_WORD_BITS as MASK_WORD_BITS

# what stands for a dropped bottleneck element: every activation and its slope are exactly 0 there, so no mask
# has to be kept beside z; float16 can hold it
DROPPED = -30000.0

_WORD_BITS = tl.constexpr(MASK_WORD_BITS)
_DROPPED = tl.constexpr(DROPPED)
# Philox4x32-7 passes BigCrush (Salmon et al. 2011, table 2); Triton's default of 10 rounds costs 40 % more
_PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def grouped_tile(num_rows, num_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of this program, walking the columns in groups of GROUP row tiles."""
    return grouped_tile_at(tl.program_id(0), num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, GROUP)


@triton.jit
def grouped_tile_at(
    pid, num_rows, num_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr
):
    """Row and column tile of the program ``pid``, walking the columns in groups of GROUP row tiles."""
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    tiles_in_group = GROUP * tl.cdiv(num_cols, BLOCK_COLS)
    first_row_tile = (pid // tiles_in_group) * GROUP
    group_rows = min(row_tiles - first_row_tile, GROUP)
    pid_in_group = pid % tiles_in_group
    return first_row_tile + pid_in_group % group_rows, pid_in_group // group_rows


@triton.jit
def block_range(pid, BLOCK: tl.constexpr):
    """Absolute indices of block ``pid``."""
    return pid * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_tile(ptr, rows, cols, stride, num_rows, num_cols):
    """Tile ``ptr[rows, cols]``; zero outside ``num_rows`` × ``num_cols``."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(ptr + offsets, mask=inside, other=0.0)


@triton.jit
def load_transposed(ptr, rows, cols, stride, num_rows, num_cols):
    """The transpose of the tile ``ptr[rows, cols]``; zero outside ``num_rows`` × ``num_cols``.

    For the left side of a product: what is loaded as it lies and turned there passes through registers on
    sm_80, this is copied to shared memory ahead of time.
    """
    offsets = rows.to(tl.int64)[None, :] * stride + cols[:, None]
    inside = (rows < num_rows)[None, :] & (cols < num_cols)[:, None]
    return tl.load(ptr + offsets, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, cols, stride, num_rows, num_cols):
    """Store ``tile`` to ``ptr[rows, cols]``, only inside ``num_rows`` × ``num_cols``."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(ptr, indices, length):
    """``ptr[indices]`` in float32; zero from ``length`` on."""
    return tl.load(ptr + indices, mask=indices < length, other=0.0).to(tl.float32)


@triton.jit
def add_s_b(acc, s_ptr, lora_b_ptr, offs_m, offs_n, M, N, R, BLOCK_R: tl.constexpr):
    """acc + S·Bᵀ, BLOCK_R ranks at a time so that any rank fits."""
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s_tile = load_tile(s_ptr, offs_m, offs_r, R, M, R)
        b_tile = load_tile(lora_b_ptr, offs_n, offs_r, R, N, R).to(s_tile.dtype)
        acc = tl.dot(s_tile, tl.trans(b_tile), acc, input_precision="ieee")
    return acc


@triton.jit
def random_words(seed, counter):
    """Four blocks of uniform uint32 from an int64 counter, the same as ``tl.randint4x`` draws.

    Both halves of a product come from one wide multiplication here; Triton's own multiplies twice.
    """
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_PHILOX_ROUNDS):
        product_0, product_2 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (product_2 >> 32).to(tl.uint32) ^ c1 ^ k0, product_2.to(tl.uint32)
        c2, c3 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1, product_0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _at_least(keep, digits, drop_threshold, FIRST: tl.constexpr):
    """Keep bits after comparing four more digits of the uniforms, from digit FIRST up, with the threshold's.

    Where the digits differ the greater one decides, where they are equal the lower digits' answer stays. That
    is the majority of three bits, one instruction for 32 elements.
    """
    for i in tl.static_range(4):
        # all ones where the threshold's digit is 0
        not_digit = (((drop_threshold >> (FIRST + i)) & 1) - 1).to(tl.uint32, bitcast=True)
        keep = (digits[i] & keep) | (not_digit & (digits[i] | keep))
    return keep


@triton.jit
def draw_low_keep(seed, rows, words_per_row, drop_threshold):
    """What the four lowest digits of a row's uniforms say, ``[rows, 1]``, for :func:`draw_keep_words`.

    The words of a row share them: only where the twelve higher digits of two elements both equal the
    threshold's, one time in 2²⁴, does that make one's answer the other's.
    """
    call = rows.to(tl.int64)[:, None] * words_per_row * 4 + 3
    return _at_least((call * 0 - 1).to(tl.uint32), random_words(seed, call), drop_threshold, 0)


@triton.jit
def draw_keep_words(seed, rows, words, words_per_row, low_keep, drop_threshold):
    """Packed keep bits, int32 ``[rows, words]``; bits of a word's elements as :func:`unpack_keep` has them.

    An element is kept when its 16-bit uniform is at least ``drop_threshold``. The 32 uniforms of a word are
    drawn and compared a binary digit at a time, from the lowest, ``low_keep`` being the answer of four.
    """
    first_call = (rows.to(tl.int64)[:, None] * words_per_row + words[None, :]) * 4
    keep = low_keep
    for call in tl.static_range(3):
        keep = _at_least(keep, random_words(seed, first_call + call), drop_threshold, 4 + 4 * call)
    # the sum over an axis of one changes nothing, but without it the compiler draws every word again in each
    # thread that unpacks a part of it, instead of passing 4 bytes on
    return tl.sum(keep.to(tl.int32, bitcast=True)[None, :, :], axis=0)


@triton.jit
def load_keep_words(mask_ptr, rows, words, words_per_row, num_rows):
    """Packed keep bits ``[rows, words]`` as :func:`draw_keep_words` made them."""
    offsets = rows.to(tl.int64)[:, None] * words_per_row + words[None, :]
    inside = (rows < num_rows)[:, None] & (words < words_per_row)[None, :]
    return tl.load(mask_ptr + offsets, mask=inside, other=0)


@triton.jit
def unpack_keep(packed, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Bool tile ``[BLOCK_ROWS, BLOCK_COLS]`` out of packed words ``[BLOCK_ROWS, BLOCK_COLS / 32]``.

    A word has the bits of its even columns in its lower half and those of its odd columns in the upper half,
    so that two neighbours' are 16 bits apart, as their values are in a register of two.
    """
    element = tl.arange(0, _WORD_BITS)
    bits = (packed[:, :, None] >> (element // 2 + element % 2 * 16)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_ROWS, BLOCK_COLS)) != 0


@triton.jit
def zero_dropped(tile, packed, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """A tile ``[BLOCK_ROWS, BLOCK_COLS]``, zero where packed words ``[BLOCK_ROWS, BLOCK_COLS / 32]`` drop."""
    if tile.dtype.primitive_bitwidth == 16:
        return _zero_dropped_pairs(tile, packed, BLOCK_ROWS, BLOCK_COLS // 2)
    else:
        return tl.where(unpack_keep(packed, BLOCK_ROWS, BLOCK_COLS), tile, 0.0)


@triton.jit
def _zero_dropped_pairs(tile, packed, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    # two neighbours share a register: one AND zeroes both, where tl.where would take them apart and join them
    low, high = tl.split(tl.reshape(tile.to(tl.uint16, bitcast=True), (ROWS, PAIRS, 2)))
    pairs = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    bits = (packed.to(tl.uint32, bitcast=True)[:, :, None] >> tl.arange(0, 16)[None, None, :]) & 0x10001
    pairs &= tl.reshape(bits * 0xFFFF, (ROWS, PAIRS))
    kept = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(kept, (ROWS, 2 * PAIRS)).to(tile.dtype, bitcast=True)


@triton.jit
def drop_bottleneck(z, seed, rows, cols, num_cols, drop_threshold):
    """z with the dropped elements set to DROPPED; kept where a 16-bit uniform is at least the threshold."""
    elements = rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    uniform = (tl.randint(seed, elements, _PHILOX_ROUNDS) & 0xFFFF).to(tl.int32)
    return tl.where(uniform >= drop_threshold, z, _DROPPED)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of a float32 tile: "gelu" (the exact one, by erf), "relu" or "silu"."""
    if ACTIVATION == "gelu":
        return z * _normal_cdf(z)
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        # not tl.maximum, which would swallow a NaN
        return tl.where(z < 0, 0.0, z)


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """The derivative of :func:`activate` at a float32 tile."""
    if ACTIVATION == "gelu":
        return _normal_cdf(z) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    else:
        return tl.where(z <= 0, 0.0, 1.0)


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1 + tl.erf(0.7071067811865476 * z))
