"""How far a run has come, and which of its epochs was the best."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from fastlora.transfer.training.records import EpochRecord, TrainResult
from fastlora.transfer.training.settings import TrainSettings

Weights = dict[str, Tensor]


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimiser steps done.
        loss_sum: Sum of the losses in the epoch under way.
        examples: Seen in the epoch under way.
        seconds: Spent on the epoch under way.
        history: The epochs that are over.
        best_epoch: Counted from 1; 0 before the first is over.
        best_weights: What the best epoch was validated with, if the settings want it back.
        stopped: Whether patience has run out.
    """

    step: int = 0
    loss_sum: float = 0.0
    examples: int = 0
    seconds: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: Weights | None = None
    stopped: bool = False

    @property
    def total_seconds(self) -> float:
        """Spent on optimiser steps."""
        return self.seconds + sum(record.seconds for record in self.history)

    def take_step(self, loss: float, examples: int) -> None:
        """Count an optimiser step of so many examples with this mean loss."""
        self.step += 1
        self.loss_sum += loss * examples
        self.examples += examples

    def figures(self, epoch: int) -> dict[str, Any]:
        """What an :class:`EpochRecord` says of training in the epoch under way, counted from 0."""
        loss = self.loss_sum / self.examples
        return {"epoch": epoch + 1, "step": self.step, "train_loss": loss, "seconds": self.seconds}

    def end_epoch(
        self, record: EpochRecord, monitor: str, settings: TrainSettings, weights: Callable[[], Weights]
    ) -> None:
        """Keep what an epoch gave.

        Args:
            record: What the epoch gave.
            monitor: What :meth:`EpochRecord.score` makes the best epoch by.
            settings: Hyper-parameters of the run, of which ``restore_best`` and ``patience`` count.
            weights: Gives what to keep where the epoch is the best so far.
        """
        self.history.append(record)
        self.loss_sum, self.examples, self.seconds = 0.0, 0, 0.0
        best = self.history[self.best_epoch - 1] if self.best_epoch else None
        if best is None or record.score(monitor) > best.score(monitor):
            self.best_epoch = record.epoch
            self.best_weights = weights() if settings.restore_best else None
        if settings.patience is not None:
            # a loss that still creeps down would decide between equals for ever
            values = [each.score(monitor)[0] for each in self.history]
            self.stopped = len(values) - 1 - values.index(max(values)) >= settings.patience

    def result(self, peak_memory_bytes: int | None, resumed_at: int | None) -> TrainResult:
        """What the run gave."""
        return TrainResult(
            self.history,
            self.best_epoch,
            self.step,
            self.stopped,
            self.total_seconds,
            peak_memory_bytes,
            resumed_at,
        )

    def stored(self) -> dict[str, Any]:
        """In types that ``torch.load(weights_only=True)`` reads."""
        return {**vars(self), "history": [vars(record) for record in self.history]}

    @classmethod
    def restored(cls, stored: Mapping[str, Any], record: type[EpochRecord]) -> Self:
        """What :meth:`stored` was made of, its history of this kind of records."""
        return cls(**{**stored, "history": [record(**each) for each in stored["history"]]})
