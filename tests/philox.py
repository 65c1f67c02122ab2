"""The random words of the kernels' dropout in NumPy, and what the kernels make of them."""

import numpy as np

from fastlora_kernels.tile import MASK_WORD_BITS, cdiv

# a seed and a threshold for tests: bits beyond 32, and both answers often
SEED, THRESHOLD = 2**40 + 77, 20000


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-7 in plain numpy: ``[4, *counter.shape]`` words."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1 = counter & low, counter >> np.uint64(32)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(7):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & low
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def mask_uniforms(seed: int, rows: int, columns: int, *, first_row: int = 0) -> np.ndarray:
    """The uniform of every element of a packed mask: digit d of 32 of them is a random word.

    Each word has its own twelve higher digits; the words of a row share the four lowest.

    Args:
        seed: Of the draw.
        rows: How many.
        columns: Elements of a row; its last word may hold more.
        first_row: The first of the rows.
    """
    words_per_row = cdiv(columns, MASK_WORD_BITS)
    at_row = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None, None]
    words = np.arange(words_per_row, dtype=np.uint64)[None, :, None]
    counters = (at_row * np.uint64(words_per_row) + words) * np.uint64(4) + np.arange(3, dtype=np.uint64)
    own = np.moveaxis(philox(seed, counters), 0, -1).reshape(rows, words_per_row, 12)
    shared = np.moveaxis(philox(seed, at_row[:, :, 0] * np.uint64(4 * words_per_row) + np.uint64(3)), 0, -1)
    drawn = np.concatenate([np.broadcast_to(shared, (rows, words_per_row, 4)), own], axis=2)
    # even columns in the lower half of a word, odd ones in the upper
    bits = drawn[..., None] >> np.arange(32, dtype=np.uint64).reshape(2, 16).T.reshape(32) & np.uint64(1)
    digits = np.uint64(1) << np.arange(16, dtype=np.uint64)
    values: np.ndarray = (bits * digits[:, None]).sum(2, dtype=np.uint64)
    return values.reshape(rows, MASK_WORD_BITS * words_per_row)[:, :columns]


def bottleneck_uniforms(seed: int, rows: int, columns: int) -> np.ndarray:
    """The uniform of every element of an adapter's bottleneck: half of a random word each."""
    elements = np.arange(rows * columns, dtype=np.uint64).reshape(rows, columns)
    uniforms: np.ndarray = philox(seed, elements)[0] & np.uint64(0xFFFF)
    return uniforms
