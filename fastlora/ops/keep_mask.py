"""Dropout masks: what every backend keeps of them, and how the ``torch`` backend draws and applies its own.

It draws them as a function of seed and shape, so that recomputation repeats them. A mask is int8: -1 keeps,
0 drops. Sign-extended to the width of a float it is the bit pattern to AND with, which is several times
cheaper on a CPU than multiplying by a bool.
"""

import numpy as np
import torch
from torch import Tensor

from fastlora_kernels.tile import MASK_WORD_BITS, cdiv

_BITS_DTYPE = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_GOLDEN_RATIO = -7046029254386353131
_FEW_ELEMENTS = 1 << 11
# what fits into a core's cache beside its mask
_ELEMENTS_PER_CHUNK = 1 << 19
_LIMITS_PER_CHUNK = 1 << 14


def drop_threshold(dropout: float) -> int:
    """Drop an element whose 16-bit uniform is below this; at least 1 and at most 65535."""
    return min(max(round(dropout * 65536), 1), 65535)


def keep_probability(dropout: float) -> float:
    """The probability that :func:`drop_threshold` realises exactly."""
    return 1 - drop_threshold(dropout) / 65536 if dropout > 0 else 1.0


def empty_keep_mask(backend: str, rows: int, x: Tensor) -> Tensor:
    """Room for the mask of x ``[..., columns]``: a byte an element, or, for the kernels, a bit.

    Args:
        backend: ``"torch"`` or ``"triton"``.
        rows: Everything but x's last dimension.
        x: What is dropped.
    """
    if backend == "torch":
        return x.new_empty(rows, x.shape[-1], dtype=torch.int8)
    return x.new_empty(rows, cdiv(x.shape[-1], MASK_WORD_BITS), dtype=torch.int32)


def draw_keep_mask(shape: tuple[int, int], dropout: float, seed: Tensor) -> Tensor:
    """Keep mask of a shape ``[rows, cols]``, on the seed's device."""
    mask = torch.empty(shape, dtype=torch.int8, device=seed.device)
    if not seed.is_cpu:
        # in one go: a launch costs more than the traffic it would save
        words = _splitmix64(seed, -(-mask.numel() // 4))
        uniforms = words.view(torch.int16)[: mask.numel()].view(shape)
        return mask.copy_(uniforms >= drop_threshold(dropout) - 32768).neg_()
    if mask.numel() < _FEW_ELEMENTS:
        # slower than the stream below, but ready at once
        generator = torch.Generator().manual_seed(int(seed))
        return mask.bernoulli_(keep_probability(dropout), generator=generator).neg_()
    _fill(mask.numpy().reshape(-1), drop_threshold(dropout), int(seed))
    return mask


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """A copy of x with the dropped elements zeroed."""
    return torch.bitwise_and(x.view(_BITS_DTYPE[x.itemsize]), keep).view(x.dtype)


def mask_(x: Tensor, keep: Tensor) -> None:
    """Zero the dropped elements of x where they are."""
    x.view(_BITS_DTYPE[x.itemsize]).bitwise_and_(keep)


def _fill(mask: np.ndarray, threshold: int, seed: int) -> None:
    """Fill an int8 mask, flat, in NumPy: on one thread, where waiting for a second costs more than it saves.

    An element takes 8 random bits. The other 8 of its threshold are decided by a limit that is one higher at
    random, as often as they say; a few elements, far apart, share one, and the probability of each is exact.
    """
    stream = np.random.SFC64(seed)
    # the limits of the rarer outcome stay below 256
    dropping = threshold <= 32768
    whole, rest = divmod(threshold if dropping else 65536 - threshold, 256)
    for start in range(0, mask.size, _ELEMENTS_PER_CHUNK):
        chunk = mask[start : start + _ELEMENTS_PER_CHUNK]
        width = min(chunk.size, _LIMITS_PER_CHUNK)
        digits = stream.random_raw(-(-(chunk.size + width) // 8)).view(np.uint8)
        limits = np.less(digits[:width], rest).view(np.uint8) + np.uint8(whole)
        digits = digits[width : width + chunk.size]
        even = chunk.size - chunk.size % width
        rare = chunk.view(np.bool_)
        np.less(digits[:even].reshape(-1, width), limits, out=rare[:even].reshape(-1, width))
        if even < chunk.size:
            np.less(digits[even:], limits[: chunk.size - even], out=rare[even:])
        if dropping:
            np.subtract(chunk, 1, out=chunk)
        else:
            np.negative(chunk, out=chunk)


def _splitmix64(seed: Tensor, words: int) -> Tensor:
    """Counter-based 64-bit words (Steele et al. 2014): no state, so a GPU needs no talk with the host."""
    z = torch.arange(1, 1 + words, device=seed.device).mul_(_GOLDEN_RATIO).add_(seed)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shift_right(z, shift)).mul_(factor)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic: clear the copies of the sign
    return (z >> bits) & ((1 << (64 - bits)) - 1)
