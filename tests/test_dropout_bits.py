"""The packed dropout bits: exactly the comparison they stand for, for every threshold, and independent."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from tests.dropout_bits_kernels import draw_kernel, own_kernel, words_kernel
from tests.lora_yardstick import unpack_mask
from tests.philox import mask_uniforms, philox

ROWS, WORDS = 64, 32
THRESHOLDS = [0, 1, 2, 3, 6554, 0x5555, 0xAAAA, 32767, 32768, 65534, 65535]


def draw(device: torch.device, threshold: int, *, seed: int = 11, first_row: int = 0) -> Tensor:
    """Packed words ``[ROWS, WORDS]`` of a mask whose rows are exactly WORDS words long."""
    packed = torch.empty(ROWS, WORDS, dtype=torch.int32, device=device)
    draw_kernel[(1,)](
        torch.tensor([seed], device=device), packed, first_row, WORDS, threshold, ROWS=ROWS, WORDS=WORDS
    )
    return packed


def unpack(packed: Tensor) -> np.ndarray:
    return unpack_mask(packed.cpu(), 32 * WORDS).numpy()


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_every_bit_is_the_comparison(kernel_device: torch.device, threshold: int) -> None:
    for seed, first_row in ((11, 0), (2**40 + 3, 0), (-5, 7)):
        packed = draw(kernel_device, threshold, seed=seed, first_row=first_row)
        assert np.array_equal(
            unpack(packed), mask_uniforms(seed, ROWS, 32 * WORDS, first_row=first_row) >= threshold
        )


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


@pytest.mark.parametrize("threshold", [40, 655, 0x5555])
def test_what_words_share_decides_only_where_their_own_digits_do_not(
    kernel_device: torch.device, threshold: int
) -> None:
    """Whatever the row's four lowest digits say: the twelve of each word's own come first."""
    own, threshold_own = mask_uniforms(11, ROWS, 32 * WORDS) >> np.uint64(4), threshold >> 4
    for low_keep, expected in ((0, own > threshold_own), (-1, own >= threshold_own)):
        packed = torch.empty(ROWS, WORDS, dtype=torch.int32, device=kernel_device)
        seed = torch.tensor([11], device=kernel_device)
        own_kernel[(1,)](seed, packed, low_keep, WORDS, threshold, ROWS=ROWS, WORDS=WORDS)
        assert np.array_equal(unpack(packed), expected)
    assert (own == threshold_own).any()


def test_two_words_answers_are_independent_to_two_to_the_minus_26() -> None:
    """Counted: of 2²⁸ values of four shared digits and twelve of each one's own, those where both drop."""
    for threshold in (*THRESHOLDS, *range(0, 65536, 97)):
        # by the shared digits, how many values of an element's own digits drop it
        drop = np.bincount(np.arange(threshold) % 16, minlength=16)
        both, independent = int((drop**2).sum()), threshold**2 / 16
        assert 0 <= both - independent <= 4


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
