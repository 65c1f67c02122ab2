"""Dropout masks of the ``torch`` backend: a function of seed and shape, so that recomputation repeats them.

A mask is int8: -1 keeps, 0 drops. Sign-extended to the width of a float it is the bit pattern to AND with,
which is several times cheaper on a CPU than multiplying by a bool.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

KEEP_MASK_DTYPE = torch.int8
_BITS_DTYPE = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_GOLDEN_RATIO = -7046029254386353131
_WORDS_PER_CHUNK = 1 << 16


def drop_threshold(dropout: float) -> int:
    """Drop an element whose 16-bit uniform is below this; at least 1 and at most 65535."""
    return min(max(round(dropout * 65536), 1), 65535)


def keep_probability(dropout: float) -> float:
    """The probability that :func:`drop_threshold` realises exactly."""
    return 1 - drop_threshold(dropout) / 65536 if dropout > 0 else 1.0


def draw_keep_mask(shape: tuple[int, int], dropout: float, seed: Tensor) -> Tensor:
    """Keep mask of a shape ``[rows, cols]``, on the seed's device."""
    elements = shape[0] * shape[1]
    mask = torch.empty(elements, dtype=KEEP_MASK_DTYPE, device=seed.device)
    lowest_kept = drop_threshold(dropout) - 32768
    for start, uniforms in _uniforms(elements, seed):
        # a comparison written as int16 is vectorised, one written as bool is not
        dropped = torch.lt(uniforms, lowest_kept, out=torch.empty_like(uniforms))
        mask[start : start + dropped.numel()].copy_(dropped.sub_(1))
    return mask.view(shape)


def masked(x: Tensor, keep: Tensor, *, out: Tensor) -> Tensor:
    """x with the dropped elements zeroed, into ``out``, which may be x."""
    bits = _BITS_DTYPE[x.element_size()]
    torch.bitwise_and(x.view(bits), keep.to(bits), out=out.view(bits))
    return out


def _uniforms(elements: int, seed: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Start and int16 uniforms of each chunk of the elements, at most that many."""
    if seed.device.type != "cpu":
        # in one go: a launch costs more than the traffic it would save
        yield 0, _splitmix64(seed, -(-elements // 4)).view(torch.int16)[:elements]
        return
    stream = np.random.SFC64(int(seed))
    for start in range(0, elements, 4 * _WORDS_PER_CHUNK):
        count = min(4 * _WORDS_PER_CHUNK, elements - start)
        words = stream.random_raw(-(-count // 4))
        yield start, torch.from_numpy(words.view(np.int64)).view(torch.int16)[:count]


def _splitmix64(seed: Tensor, words: int) -> Tensor:
    """Counter-based 64-bit words (Steele et al. 2014): no state, so a GPU needs no talk with the host."""
    z = torch.arange(1, 1 + words, device=seed.device).mul_(_GOLDEN_RATIO).add_(seed)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shift_right(z, shift)).mul_(factor)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic: clear the copies of the sign
    return (z >> bits) & ((1 << (64 - bits)) - 1)
