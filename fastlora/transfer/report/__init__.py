"""What a run gave: one record per method, written as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlora.transfer.fit import EpochResult
from fastlora.transfer.metrics import (
    accuracy,
    accuracy_interval,
    accuracy_standard_error,
    balanced_accuracy,
    confusion_matrix,
)


@dataclass(frozen=True)
class MethodResult:
    """What one way to train gave.

    Attributes:
        strategy: Machine name, ``"linear_probe"`` for example.
        title: Name for readers.
        parameters: Number of values that are trained, and of all values in the model.
        labels: int64 ``[n]``, the test examples' classes.
        predictions: int64 ``[n]``, what the model made of them.
        num_classes: Number of classes.
        history: The epochs.
        seconds: Training time without evaluation.
        peak_memory_bytes: See :class:`fastlora._core.memory.PeakMemory`; None where it can't be measured.
        adapter_bytes: Size of a file that holds what was trained, or None where it isn't known.
        hyper_parameters: Whatever is needed to repeat the run.
        adapter_folder: Name of the folder that holds the file, or None where none is written.
    """

    strategy: str
    title: str
    parameters: tuple[int, int]
    labels: Tensor
    predictions: Tensor
    num_classes: int
    history: list[EpochResult]
    seconds: float
    peak_memory_bytes: int | None
    adapter_bytes: int | None
    hyper_parameters: Mapping[str, Any]
    adapter_folder: str | None = None

    @property
    def confusion(self) -> Tensor:
        """int64 ``[classes, classes]``; row = true class, column = predicted class."""
        return confusion_matrix(self.labels, self.predictions, self.num_classes)

    def with_adapter(self, folder: Path) -> "MethodResult":
        """The same result, knowing the folder its adapter was written to."""
        size = (folder / "adapter_model.safetensors").stat().st_size
        return replace(self, adapter_bytes=size, adapter_folder=folder.name)

    def as_json(self) -> dict[str, Any]:
        """The record of this method in ``report.json``."""
        trainable, total = self.parameters
        return {
            "strategy": self.strategy,
            "title": self.title,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "trainable_percent": 100 * trainable / total,
            "accuracy": accuracy(self.confusion),
            "accuracy_standard_error": accuracy_standard_error(self.confusion),
            "accuracy_interval": list(accuracy_interval(self.confusion)),
            "balanced_accuracy": balanced_accuracy(self.confusion),
            "validation_accuracy": self.history[-1].validation_accuracy,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "adapter_bytes": self.adapter_bytes,
            "adapter_folder": self.adapter_folder,
            "hyper_parameters": dict(self.hyper_parameters),
            "epochs": [asdict(epoch) for epoch in self.history],
            "confusion": self.confusion.tolist(),
        }


def parameter_counts(*modules: nn.Module) -> tuple[int, int]:
    """Trainable and total number of parameter values.

    Example:
        >>> parameter_counts(nn.Linear(2, 3), nn.Linear(2, 3).requires_grad_(False))
        (9, 18)
    """
    # what two modules share counts once
    parameters = list(nn.ModuleList(modules).parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in parameters)
