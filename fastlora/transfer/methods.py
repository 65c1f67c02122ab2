"""The ways to train that the demo compares, each on the same pictures with the same seed."""

import contextlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlora
from fastlora import _backend
from fastlora.transfer.backbones import dinov2_vits14
from fastlora.transfer.datasets import ImageSet, Splits, normalise
from fastlora.transfer.fit import EpochResult, Examples, Fit, FitSettings, OnStep, Task
from fastlora.transfer.memory import PeakMemory
from fastlora.transfer.probe import StandardisedLinear, extract_features, mirrored, probe_task
from fastlora.transfer.report import MethodResult, parameter_counts

PROBE, FUSED, EAGER = "Linear probe", "LoRA, fused", "LoRA, eager reference"


class Reporter(Protocol):
    """Where a run tells how it gets on."""

    def note(self, text: str) -> None:
        """Say something once."""

    def advance(self, task: str, done: int, total: int, loss: float | None) -> None:
        """Say that ``done`` of ``total`` units of a task are done, and the last one's loss if it has one."""


@dataclass(frozen=True)
class LoRASettings:
    """How LoRA is put into the backbone; ``alpha / rank`` is its strength."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Study:
    """What all methods share.

    Attributes:
        parts: The pictures.
        image_size: Their height and width in pixels.
        accelerator: An ``accelerate.Accelerator``.
        seed: Of initial weights, order and augmentation.
        reporter: Is told about the progress.
    """

    parts: Splits
    image_size: int
    accelerator: Any
    seed: int
    reporter: Reporter

    def backbone(self) -> nn.Module:
        """The pretrained model with a head at zero, on the device."""
        model: nn.Module = dinov2_vits14(self.image_size, len(self.parts.train.classes))
        model.to(self.accelerator.device)
        return model

    def on_step(self, task: str, steps: int | None = None) -> OnStep:
        """What to call after each optimiser step of ``task``, which ends early after ``steps``."""
        return lambda done, total, loss: self.reporter.advance(task, done, min(total, steps or total), loss)

    def on_batch(self, task: str, total: int) -> Callable[[int], None]:
        """What to call with the size of each batch of ``task``'s ``total`` pictures."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.reporter.advance(task, done, total, None)

        return advance


def linear_probe(study: Study, settings: FitSettings) -> MethodResult:
    """Train a linear layer on what the frozen backbone makes of the pictures.

    The seconds are those of the features of the training pictures, in every orientation, and of the training.
    """
    parts, memory = study.parts, PeakMemory(study.accelerator.device)
    backbone = study.backbone().requires_grad_(False)
    backbone.heads = nn.Identity()
    variants = mirrored(parts.train)
    pictures = len(variants) * len(parts.train) + len(parts.validation) + len(parts.test)
    on_batch = study.on_batch(f"{PROBE}: features", pictures)

    def features(images: ImageSet, variants: list[Tensor]) -> Examples:
        return Examples(extract_features(backbone, variants, study.accelerator, on_batch), images.labels)

    with memory:
        started = time.perf_counter()
        train = features(parts.train, variants)
        extraction = time.perf_counter() - started
    validation, test = (features(part, [part.images]) for part in (parts.validation, parts.test))
    torch.manual_seed(study.seed)
    head = StandardisedLinear(train.inputs.flatten(0, 1), len(parts.train.classes))
    task = probe_task(train, validation)
    fit = Fit(head, task, settings, study.accelerator, seed=study.seed, on_step=study.on_step(PROBE))
    with memory:
        while not fit.finished:
            fit.run_epoch()
    return MethodResult(
        strategy="linear_probe",
        title=PROBE,
        parameters=parameter_counts(backbone, head),
        labels=parts.test.labels,
        predictions=fit.predict(test.inputs),
        num_classes=len(parts.test.classes),
        history=fit.history,
        seconds=extraction + _training_seconds(fit),
        peak_memory_bytes=memory.bytes,
        adapter_bytes=len(save(head.state_dict())),
        hyper_parameters=asdict(settings),
    )


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
    study: Study, settings: FitSettings, lora: LoRASettings, *, eager_epochs: int
) -> tuple[MethodResult, EagerComparison, nn.Module]:
    """Train LoRA on all linear layers, and its first epochs a second time with the eager formula.

    Both do the same steps on the same batches and take turns, an epoch each, so that whatever else the
    machine does slows both down alike. While they do, both models are in memory.

    Args:
        study: What is trained on.
        settings: How.
        lora: How LoRA is put in.
        eager_epochs: Epochs after which the eager run ends.

    Returns:
        The fused run's result, the comparison with the eager one, and the fused run's model.
    """
    eager_steps = eager_epochs * settings.steps_per_epoch(len(study.parts.train))
    fused = _LoRARun(study, settings, lora, contextlib.nullcontext, study.on_step(FUSED))
    eager = _LoRARun(study, settings, lora, _eager_backend, study.on_step(EAGER, eager_steps))
    while not fused.fit.finished:
        fused.run_epoch()
        if len(eager.fit.history) < eager_epochs:
            eager.run_epoch()
    result, steps = fused.result(), len(eager.fit.step_seconds)
    ours, theirs = (statistics.median(run.fit.step_seconds[:steps]) for run in (fused, eager))
    projected = result.seconds * theirs / ours
    comparison = EagerComparison(ours, theirs, steps, projected, eager.memory.bytes, eager.fit.history)
    return result, comparison, fused.model


class _LoRARun:
    """One of the runs that take turns."""

    def __init__(
        self,
        study: Study,
        settings: FitSettings,
        lora: LoRASettings,
        backend: Callable[[], AbstractContextManager[None]],
        on_step: OnStep,
    ) -> None:
        self._study, self._backend = study, backend
        self._hyper_parameters = asdict(settings) | asdict(lora)
        self.memory = PeakMemory(study.accelerator.device)
        torch.manual_seed(study.seed)
        self.model = fastlora.apply_lora(study.backbone(), **asdict(lora), modules_to_save=["head"])
        parts = study.parts
        task = Task(
            Examples(parts.train.images, parts.train.labels),
            Examples(parts.validation.images, parts.validation.labels),
            augment=lambda images, generator: normalise(_flipped(images, parts.train.flip_dims, generator)),
            prepare=normalise,
        )
        self.fit = Fit(
            self.model,
            task,
            settings,
            study.accelerator,
            seed=study.seed,
            on_step=on_step,
            head=self.model.get_submodule("heads"),
        )

    def run_epoch(self) -> None:
        with self._backend(), self.memory, _attention(self._study.accelerator.device):
            self.fit.run_epoch()

    def result(self) -> MethodResult:
        test = self._study.parts.test
        with self._backend():
            predictions = self.fit.predict(test.images)
            backend = _backend.resolve(self._study.accelerator.device, torch.float32)
        return MethodResult(
            strategy="lora",
            title=FUSED,
            parameters=parameter_counts(self.model),
            labels=test.labels,
            predictions=predictions,
            num_classes=len(test.classes),
            history=self.fit.history,
            seconds=_training_seconds(self.fit),
            peak_memory_bytes=self.memory.bytes,
            adapter_bytes=None,
            hyper_parameters=self._hyper_parameters | {"backend": backend},
        )


def _eager_backend() -> AbstractContextManager[None]:
    return fastlora.use_backend("reference")


def _attention(device: torch.device) -> AbstractContextManager[None]:
    # on CPUs the backward pass of PyTorch's fused attention is slow for so few tokens: a whole training step
    # of 16 pictures of 112 px takes 0.65 s with it and 0.50 s with the plain products (torch 2.14, two cores)
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _training_seconds(fit: Fit) -> float:
    return sum(epoch.seconds for epoch in fit.history)


def _flipped(images: Tensor, dims: tuple[int, ...], generator: torch.Generator) -> Tensor:
    for dim in dims:
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(chosen, images.flip(dim), images)
    return images
