"""What the fused layers save: the first epochs of LoRA again, with the eager formula."""

import statistics
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fastlora._core.backend import use_backend
from fastlora.transfer.fit import EpochResult
from fastlora.transfer.report import MethodResult
from fastlora.transfer.study import Study
from fastlora.transfer.tuning import Tuning, TuningRun

EAGER = "LoRA, eager reference"


@dataclass(frozen=True)
class EagerComparison:
    """The first epochs of a LoRA run again, with the eager formula in place of the fused layers.

    Attributes:
        fused: Median seconds of a step with the fused layers, in the epochs that both ran.
        eager: The same with the eager formula.
        steps: How many steps each of the medians is of.
        seconds: What the whole run would take with the eager formula: the fused seconds x eager / fused.
        peak_memory_bytes: See :class:`PeakMemory`.
        history: The eager epochs, to compare with the fused run's.
    """

    fused: float
    eager: float
    steps: int
    seconds: float
    peak_memory_bytes: int | None
    history: list[EpochResult]

    def as_json(self) -> dict[str, Any]:
        """The record in ``report.json``."""
        return {
            "title": EAGER,
            "steps_measured": self.steps,
            "fused_step_seconds": self.fused,
            "eager_step_seconds": self.eager,
            "eager_over_fused": self.eager / self.fused,
            "projected_seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "epochs": [asdict(epoch) for epoch in self.history],
        }


def lora_and_reference(
    study: Study, tuning: Tuning, *, epochs: int
) -> tuple[MethodResult, EagerComparison, nn.Module]:
    """Train LoRA on all linear layers, and its first epochs a second time with the eager formula.

    Both do the same steps on the same batches and take turns, an epoch each, so that whatever else the
    machine does slows both down alike. While they do, both models are in memory.

    Args:
        study: What is trained on.
        tuning: How LoRA is put in and trained.
        epochs: Epochs after which the eager run ends.

    Returns:
        The fused run's result, the comparison with the eager one, and the fused run's model.
    """
    steps = epochs * tuning.fit.steps_per_epoch(len(study.parts.train))
    fused = TuningRun(study, tuning)
    eager = TuningRun(study, tuning, on_step=study.on_step(EAGER, steps), backend=_eager_backend)
    while not fused.fit.finished:
        fused.run_epoch()
        if len(eager.fit.history) < epochs:
            eager.run_epoch()
    result, steps = fused.result(), len(eager.fit.step_seconds)
    ours, theirs = (statistics.median(run.fit.step_seconds[:steps]) for run in (fused, eager))
    projected = result.seconds * theirs / ours
    comparison = EagerComparison(ours, theirs, steps, projected, eager.memory.bytes, eager.fit.history)
    return result, comparison, fused.model


def _eager_backend() -> AbstractContextManager[None]:
    return use_backend("reference")
