"""The packed dropout bits: exactly the comparison they stand for, for every threshold, and independent."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from tests.dropout_bits_kernels import draw_kernel, words_kernel

ROWS, WORDS = 64, 32
THRESHOLDS = [0, 1, 2, 3, 6554, 0x5555, 0xAAAA, 32767, 32768, 65534, 65535]


def draw(device: torch.device, threshold: int, *, seed: int = 11, first_row: int = 0) -> Tensor:
    """Packed words ``[ROWS, WORDS]`` of a mask whose rows are exactly WORDS words long."""
    packed = torch.empty(ROWS, WORDS, dtype=torch.int32, device=device)
    draw_kernel[(1,)](
        torch.tensor([seed], device=device), packed, first_row, WORDS, threshold, ROWS=ROWS, WORDS=WORDS
    )
    return packed


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


def uniforms(seed: int, first_row: int = 0) -> np.ndarray:
    """The uniform of every element ``[ROWS, 32 * WORDS]``: digit d of 32 of them is a random word."""
    rows = np.arange(first_row, first_row + ROWS, dtype=np.uint64)[:, None, None]
    words = np.arange(WORDS, dtype=np.uint64)[None, :, None]
    counters = (rows * np.uint64(WORDS) + words) * np.uint64(4) + np.arange(4, dtype=np.uint64)
    drawn = np.moveaxis(philox(seed, counters), 0, -1).reshape(ROWS, WORDS, 16)
    bits = drawn[..., None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)
    digits = np.uint64(1) << np.arange(16, dtype=np.uint64)
    values: np.ndarray = (bits * digits[:, None]).sum(2, dtype=np.uint64)
    return values.reshape(ROWS, 32 * WORDS)


def unpack(packed: Tensor) -> np.ndarray:
    words = packed.cpu().numpy().view(np.uint32)
    return ((words[..., None] >> np.arange(32, dtype=np.uint32)) & 1).reshape(ROWS, 32 * WORDS).astype(bool)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_every_bit_is_the_comparison(kernel_device: torch.device, threshold: int) -> None:
    for seed, first_row in ((11, 0), (2**40 + 3, 0), (-5, 7)):
        packed = draw(kernel_device, threshold, seed=seed, first_row=first_row)
        assert np.array_equal(unpack(packed), uniforms(seed, first_row) >= threshold)


def test_the_ends_of_the_threshold(kernel_device: torch.device) -> None:
    """0 drops nothing; 1 drops what is 0, 65535 keeps what is 65535: one element in 65536."""
    assert unpack(draw(kernel_device, 0)).all()
    # four times as many elements as a uniform has values: four expected, and the seed is fixed
    drawn = [unpack(draw(kernel_device, 1, first_row=row)) for row in range(0, 256, ROWS)]
    assert 1 <= sum((~kept).sum() for kept in drawn) <= 15
    drawn = [unpack(draw(kernel_device, 65535, first_row=row)) for row in range(0, 256, ROWS)]
    assert 1 <= sum(kept.sum() for kept in drawn) <= 15


def test_words_are_those_of_triton(kernel_device: torch.device) -> None:
    """Seeds and counters beyond 32 bits, so that all four words of the state take part."""
    counter = torch.randint(0, 2**62, (256,)).to(kernel_device)
    for seed in (0, 1, 2**31, 2**63 - 1, -1):
        ours, theirs = (torch.empty(4, 256, dtype=torch.int32, device=kernel_device) for _ in range(2))
        words_kernel[(1,)](torch.tensor([seed], device=kernel_device), counter, ours, theirs, SIZE=256)
        assert torch.equal(ours, theirs)
        expected = philox(seed, counter.cpu().numpy().astype(np.uint64))
        assert np.array_equal(ours.cpu().numpy().view(np.uint32), expected.astype(np.uint32))


@pytest.mark.parametrize("threshold", [655, 6554, 32768, 58982])
def test_kept_frequency(kernel_device: torch.device, threshold: int) -> None:
    """Of all elements, and of every bit of a word, within five standard deviations."""
    keep, expected = unpack(draw(kernel_device, threshold)), 1 - threshold / 65536
    deviation = (expected * (1 - expected)) ** 0.5
    assert abs(keep.mean() - expected) < 5 * deviation * keep.size**-0.5
    by_bit = keep.reshape(-1, 32).mean(0)
    assert np.abs(by_bit - expected).max() < 5 * deviation * (ROWS * WORDS) ** -0.5


@pytest.mark.parametrize("threshold", [6554, 32768])
def test_elements_are_independent(kernel_device: torch.device, threshold: int) -> None:
    """Correlation with the neighbours, the same bit of the next words, and the next rows."""
    expected = 1 - threshold / 65536
    keep = (unpack(draw(kernel_device, threshold)) - expected) / (expected * (1 - expected)) ** 0.5
    for shift in (1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 128):
        assert abs((keep[:, shift:] * keep[:, :-shift]).mean()) < 5 * keep[:, shift:].size ** -0.5, shift
    for shift in (1, 2, 7):
        assert abs((keep[shift:] * keep[:-shift]).mean()) < 5 * keep[shift:].size ** -0.5, shift
    other = (unpack(draw(kernel_device, threshold, seed=12)) - expected) / (expected * (1 - expected)) ** 0.5
    assert abs((keep * other).mean()) < 5 * keep.size**-0.5
