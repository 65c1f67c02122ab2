"""What a training run gave."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.transfer.data import LabelledImages
from fastlora.transfer.metrics import accuracy, balanced_accuracy, confusion_matrix


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch gave.

    Attributes:
        epoch: Counted from 1.
        step: Optimiser steps done by its end.
        train_loss: Mean over the training examples seen, as they were mixed and smoothed.
        validation_loss: Mean cross-entropy.
        accuracy: Accuracy on validation, 0 to 1.
        balanced_accuracy: Mean over the classes of the accuracy on validation, 0 to 1.
        lr: The head's rate at the last step.
        trained_stages: Stages that trained beside the head; None where the strategy never changes that.
        seconds: Spent on the optimiser steps, over all resumptions.
    """

    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    accuracy: float
    balanced_accuracy: float
    lr: float
    trained_stages: int | None
    seconds: float

    def score(self, monitor: str) -> tuple[float, float]:
        """Higher is better; the loss decides between equals."""
        first = -self.validation_loss if monitor == "loss" else getattr(self, monitor)
        return float(first), -self.validation_loss

    def scalars(self) -> dict[str, float]:
        """What a log draws over the epochs."""
        return {
            "loss": self.validation_loss,
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
        }


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        history: The epochs.
        best_epoch: Counted from 1; the model has its weights if the settings' ``restore_best`` says so.
        steps: Optimiser steps done.
        stopped_early: Whether ``patience`` ended it.
        seconds: Spent on optimiser steps, without validation, over all resumptions.
        peak_memory_bytes: From :class:`fastlora._core.memory.PeakMemory`, of this process alone.
        resumed_at: The step that this process began at; None for a run from the start.
    """

    history: list[EpochRecord]
    best_epoch: int
    steps: int
    stopped_early: bool
    seconds: float
    peak_memory_bytes: int | None
    resumed_at: int | None

    @property
    def best(self) -> EpochRecord:
        """The best epoch."""
        return self.history[self.best_epoch - 1]


def scores(logits: Tensor, images: LabelledImages) -> dict[str, float]:
    """What an epoch's logits ``[n, classes]`` of the validation pictures are worth."""
    labels = torch.tensor(images.labels)
    confusion = confusion_matrix(labels, logits.argmax(dim=1), len(images.classes))
    return {
        "validation_loss": float(F.cross_entropy(logits.double(), labels)),
        "accuracy": accuracy(confusion),
        "balanced_accuracy": balanced_accuracy(confusion),
    }
