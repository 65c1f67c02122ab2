"""What a run gave: one record per method, written as JSON."""

import contextlib
import platform
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.files import write_file as write_file
from fastlora._core.files import write_report as write_report
from fastlora.transfer.fit import EpochResult
from fastlora.transfer.metrics import (
    accuracy,
    accuracy_interval,
    accuracy_standard_error,
    balanced_accuracy,
    confusion_matrix,
)

_PACKAGES = ("fastlora-triton", "torch", "torchvision", "triton", "accelerate")


class ReportError(OSError):
    """What a run trained is saved, but not all that is told about it could be written."""


@contextlib.contextmanager
def reporting(output: Path) -> Iterator[None]:
    """Where the report of a finished run is written.

    Raises:
        ReportError: Something failed inside; it says that the model is not lost.
    """
    try:
        yield
    except OSError:
        # of the disk, and says so itself
        raise
    except Exception as error:
        raise ReportError(
            f"the trained model is saved in {output}, but its report can't be written: "
            f"{type(error).__name__}: {error}"
        ) from error


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


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Device, precision and versions: what a reader needs to judge the timings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": str(device),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
    }


def check_output_folder(folder: Path) -> None:
    """Make the folder and see that files can be written there, so that no run ends with nothing.

    Raises:
        NotADirectoryError: It is a file, or lies under one.
        PermissionError: It can't be made or written to.
    """
    advice = f"expected a folder to write to, got {folder}"
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{advice}, which is or lies under a file; choose another --output"
        ) from error
    except OSError as error:
        raise PermissionError(
            f"{advice}, which can't be written to ({error.strerror}); choose another --output"
        ) from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
