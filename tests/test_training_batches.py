"""What is in a batch, and that its randomness belongs to the example."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastlora.transfer.data import open_images
from fastlora.transfer.finetune.cached import Rows
from fastlora.transfer.training.batches import BatchPlan, Seeded
from tests.training_runs import COUNT, Noise, pictures


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("in_pairs", [False, True])
def test_every_example_counts_once_in_an_epoch(processes: int, in_pairs: bool) -> None:
    seen: list[str] = []
    for rank in range(processes):
        plan = BatchPlan(pictures(), 8, 0, 2, rank, processes, in_pairs)
        for parts in plan.load(0, 0, 0):
            assert all(len(part.labels) == len(part.counted) for part in parts)
            assert not in_pairs or all(len(part.labels) % 2 == 0 for part in parts)
            seen += [name for part in parts for name in part.names]
            assert sum(int(part.counted.sum()) for part in parts) == sum(len(part.names) for part in parts)
    assert sorted(seen) == sorted(pictures().names)


def test_augmentation_belongs_to_the_example_not_to_its_place() -> None:
    def by_name(batch_size: int, workers: int) -> dict[str, Tensor]:
        plan = BatchPlan(pictures(Noise()), batch_size, 0)
        parts = [part for parts in plan.load(2, 0, workers) for part in parts]
        return {name: pixels for part in parts for name, pixels in zip(part.names, part.inputs, strict=True)}

    one, other = by_name(8, 0), by_name(5, 2)
    assert all(torch.equal(one[name], other[name]) for name in one)


class Drawn(Dataset[tuple[Tensor, int]]):
    """A data set with an augmentation of its own."""

    targets = tuple(index % 2 for index in range(COUNT))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 8, 8), self.targets[index]


def test_what_a_data_set_draws_itself_belongs_to_the_example_too() -> None:
    def by_name(batch_size: int, epoch: int, seed: int = 0) -> dict[str, Tensor]:
        plan = BatchPlan(open_images(Drawn()).subset(range(1, COUNT)), batch_size, seed)
        parts = [part for parts in plan.load(epoch, 0, 0) for part in parts]
        return {name: pixels for part in parts for name, pixels in zip(part.names, part.inputs, strict=True)}

    one, again, later, other = by_name(8, 2), by_name(5, 2), by_name(8, 3), by_name(8, 2, seed=1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], changed[name]) for name in one for changed in (later, other))


def test_only_what_is_known_to_draw_nothing_is_read_without_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> Any:
        raise AssertionError("seeded")

    monkeypatch.setattr("fastlora.transfer.training.batches.seeded", refuse)
    features = replace(pictures(), read=Rows(torch.eye(COUNT)))
    assert torch.equal(Seeded(features.subset([3, 5]), 0)[0, 1][0], torch.eye(COUNT)[5])
    for drawn in (features.with_transform(Noise()), open_images(Drawn()), pictures().subset([0])):
        with pytest.raises(AssertionError, match="seeded"):
            Seeded(drawn, 0)[0, 0]
