"""Which examples are in which batch, part and process: a function of seed, epoch and step alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastlora._core.interruption import leave_signals_to_parent
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.training.batching import count_batches, cut
from fastlora.transfer.training.randomness import derived_seed, seeded
from fastlora.transfer.training.settings import TrainSettings


@dataclass(frozen=True)
class Part:
    """What a process computes at once.

    Attributes:
        inputs: Transformed pictures ``[b, ...]``.
        labels: Classes of the pictures, int64 ``[b]``.
        counted: float32 ``[b]``: how much an example counts, 0 for one that only fills up the part.
        names: Names of the pictures, for people.
    """

    inputs: Tensor
    labels: Tensor
    counted: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class BatchPlan:
    """Cuts an epoch into batches, and batches into parts of equal size for each process.

    What is short of a part is filled up with its last example, which doesn't count.

    Attributes:
        images: With the training transform.
        batch_size: Examples of an optimiser step.
        seed: Seed of order and augmentation.
        accumulation: Parts of a batch in a process.
        rank: Number of this process, from 0.
        processes: How many there are.
        in_pairs: Keep neighbours (0 and 1, 2 and 3, …) in one part, for mixup.
        full: Fill the last batch of an epoch with the first examples of that epoch, or leave out the one
            example that it would have.
        weights: float32 ``[n]``, how much each example counts; None counts each as 1.
    """

    images: LabelledImages
    batch_size: int
    seed: int
    accumulation: int = 1
    rank: int = 0
    processes: int = 1
    in_pairs: bool = False
    full: bool = False
    weights: Tensor | None = None

    @classmethod
    def of(
        cls,
        images: LabelledImages,
        settings: TrainSettings,
        accelerator: Any,
        *,
        seed: int | None = None,
        **how: Any,
    ) -> Self:
        """The plan of a run's settings; ``seed`` instead of theirs, and ``how`` the other attributes."""
        return cls(
            images,
            settings.batch_size,
            settings.seed if seed is None else seed,
            settings.accumulation,
            accelerator.process_index,
            accelerator.num_processes,
            **how,
        )

    def batches(self, epoch: int) -> list[list[int]]:
        """Indices of the examples of every batch of an epoch, the same in every process."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        order = torch.randperm(len(self.images), generator=generator)
        if self.full:
            wanted = count_batches(len(order), self.batch_size) * self.batch_size
            order = order[torch.arange(wanted) % len(order)]
        return [batch.tolist() for batch in cut(order, self.batch_size)]

    def load(self, epoch: int, first: int, workers: int) -> Iterator[list[Part]]:
        """The parts of this process, from the epoch's batch number ``first`` on."""
        shares = [self._share(batch) for batch in self.batches(epoch)[first:]]
        keys = [[(epoch, index) for index in part] for share in shares for part, _ in share]
        loader: DataLoader[Any] = DataLoader(
            Seeded(self.images, self.seed),
            batch_sampler=keys,
            num_workers=workers,
            worker_init_fn=leave_signals_to_parent,
            # its own, or beginning an epoch would draw from the generator that dropout draws from
            generator=torch.Generator(),
        )
        loaded = iter(loader)
        for share in shares:
            yield [self._part(next(loaded), indices, counted) for indices, counted in share]

    def _share(self, batch: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        pieces = self.accumulation * self.processes
        # not one example in a part where a whole batch gives it more: see fastlora.transfer.training.batching
        size = max(-(-len(batch) // pieces), min(2, -(-self.batch_size // pieces)))
        size += size % 2 if self.in_pairs else 0
        filled = [*batch, *[batch[-1]] * (pieces * size - len(batch))]
        counted = [int(place < len(batch)) for place in range(len(filled))]
        starts = [(part * self.processes + self.rank) * size for part in range(self.accumulation)]
        return [(filled[start : start + size], counted[start : start + size]) for start in starts]

    def _part(self, loaded: tuple[Tensor, Tensor], indices: list[int], counted: list[int]) -> Part:
        names = tuple(self.images.names[i] for i, count in zip(indices, counted, strict=True) if count)
        weights = torch.tensor(counted, dtype=torch.float32)
        return Part(*loaded, weights if self.weights is None else weights * self.weights[indices], names)


@dataclass(frozen=True)
class Seeded(Dataset[tuple[Any, int]]):
    """Examples whose random reading and transform depend on seed, epoch and index alone, in any process."""

    images: LabelledImages
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        """The example at (epoch, index)."""
        epoch, index = key
        # features that were computed before: seeding would take a third of a step
        if self.images.draws_nothing:
            return self.images[index]
        with seeded(derived_seed(self.seed, epoch, index)):
            return self.images[index]
