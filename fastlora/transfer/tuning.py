"""Train through the whole backbone: one run for all ways to choose what trains in it."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlora._core import backend as _backend
from fastlora._core.memory import PeakMemory
from fastlora.state.save import save_adapter
from fastlora.transfer.data.bundled import normalise
from fastlora.transfer.fit import Examples, Fit, FitSettings, OnStep, Task
from fastlora.transfer.report import MethodResult, parameter_counts
from fastlora.transfer.study import Study


@dataclass(frozen=True)
class Tuning:
    """A way to train through the whole backbone.

    Attributes:
        strategy: Machine name.
        title: Name for readers.
        fit: How it is trained.
        options: What ``apply`` takes by keyword, for the report too.
        apply: Changes a model in place so that what should train does, the head included.
        folder: Where :func:`fastlora.save_adapter` writes what was trained; None if nothing is written.
        fused: Whether it brings layers that a backend of ours serves.
    """

    strategy: str
    title: str
    fit: FitSettings
    options: Mapping[str, Any]
    apply: Callable[..., nn.Module]
    folder: str | None = None
    fused: bool = False

    def limited(self, epochs: int | None, max_steps: int | None) -> "Tuning":
        """The same with this many epochs, and at most so many optimiser steps."""
        epochs = self.fit.epochs if epochs is None else epochs
        return replace(self, fit=replace(self.fit, epochs=epochs, max_steps=max_steps))


class TuningRun:
    """A tuning of a fresh backbone, which advances by an epoch per :meth:`run_epoch`.

    Args:
        study: What is trained on.
        tuning: What trains, and how.
        on_step: See :class:`fastlora.transfer.fit.Fit`; None reports progress under the tuning's title.
        backend: Makes the context that each epoch and the test run in.
    """

    def __init__(
        self,
        study: Study,
        tuning: Tuning,
        *,
        on_step: OnStep | None = None,
        backend: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """See the class."""
        self._study, self._tuning, self._backend = study, tuning, backend
        self.memory = PeakMemory(study.accelerator.device)
        torch.manual_seed(study.seed)
        self.model = tuning.apply(study.backbone(), **tuning.options)
        if study.accelerator.device.type == "cpu":
            _speed_up_attention(self.model)
        self.fit = Fit(
            self.model,
            _picture_task(study),
            tuning.fit,
            study.accelerator,
            seed=study.seed,
            on_step=on_step or study.on_step(tuning.title),
            head=self.model.get_submodule("heads"),
        )

    def run_epoch(self) -> None:
        """Train for an epoch and validate."""
        with self._backend(), self.memory, _attention(self._study.accelerator.device):
            self.fit.run_epoch()

    def result(self) -> MethodResult:
        """What the run gave; tests the model."""
        test, tuning = self._study.parts.test, self._tuning
        hyper_parameters = asdict(tuning.fit) | dict(tuning.options)
        with self._backend():
            predictions = self.fit.predict(test.images)
            if tuning.fused:
                device = self._study.accelerator.device
                hyper_parameters["backend"] = _backend.resolve(device, torch.float32)
        return MethodResult(
            strategy=tuning.strategy,
            title=tuning.title,
            parameters=parameter_counts(self.model),
            labels=test.labels,
            predictions=predictions,
            num_classes=len(test.classes),
            history=self.fit.history,
            seconds=self.fit.seconds,
            peak_memory_bytes=self.memory.bytes,
            adapter_bytes=None,
            hyper_parameters=hyper_parameters,
        )


def tune(study: Study, tuning: Tuning) -> tuple[MethodResult, nn.Module]:
    """Train and test.

    Args:
        study: What is trained on.
        tuning: What trains, and how.

    Returns:
        The result and the trained model.
    """
    run = TuningRun(study, tuning)
    while not run.fit.finished:
        run.run_epoch()
    return run.result(), run.model


def save_trained(result: MethodResult, tuning: Tuning, model: nn.Module, output: Path) -> MethodResult:
    """Write the adapter of a trained model under ``output``.

    Args:
        result: Of the run.
        tuning: Of the run; without a folder nothing is written.
        model: Of the run.
        output: Holds the tuning's folder.

    Returns:
        The result that knows the size of what was trained, written or not.
    """
    if tuning.folder is None:
        return replace(result, adapter_bytes=len(save(model.state_dict())))
    return result.with_adapter(save_adapter(model, output / tuning.folder))


def _picture_task(study: Study) -> Task:
    parts = study.parts
    return Task(
        Examples(parts.train.images, parts.train.labels),
        Examples(parts.validation.images, parts.validation.labels),
        augment=lambda images, generator: normalise(_flipped(images, parts.train.flip_dims, generator)),
        prepare=normalise,
    )


def _attention(device: torch.device) -> AbstractContextManager[None]:
    # on CPUs the backward pass of PyTorch's fused attention is slow for so few tokens: a whole training step
    # of 16 pictures of 112 px takes 0.65 s with it and 0.50 s with the plain products (torch 2.14, two cores)
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _speed_up_attention(model: nn.Module) -> None:
    # attention swaps pictures and tokens before its first product, and PyTorch multiplies such a view with a
    # frozen weight in slow pieces: a step of 16 pictures with adapters takes 2.2 s so and 0.8 s with tokens
    # first in memory (torch 2.14, bf16, one core)
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and not module.in_proj_weight.requires_grad:
            module.register_forward_pre_hook(_tokens_first)


def _tokens_first(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # the same object three times, as it came: attention looks whether its query is its key
    (x,) = set(inputs)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return x, x, x


def _flipped(images: Tensor, dims: tuple[int, ...], generator: torch.Generator) -> Tensor:
    for dim in dims:
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(chosen, images.flip(dim), images)
    return images
