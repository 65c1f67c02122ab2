"""A small training loop: AdamW, cosine rate with warm-up, an epoch at a time, on Accelerate's device."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.transfer.training.batching import count_batches, cut

_EVALUATION_BATCH = 64

OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Examples:
    """What a model reads and what it should answer.

    Attributes:
        inputs: ``[n, ...]``.
        labels: int64 ``[n]``.
    """

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """The data of a training run and how stored inputs become model inputs.

    Attributes:
        train: To learn from.
        validation: To watch.
        augment: From stored inputs and a generator to randomly varied model inputs, for training.
        prepare: From stored inputs to model inputs, for everything else.
    """

    train: Examples
    validation: Examples
    augment: Callable[[Tensor, torch.Generator], Tensor]
    prepare: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FitSettings:
    """Hyper-parameters of a training run.

    Attributes:
        epochs: Passes over the training examples.
        batch_size: Examples per optimiser step.
        learning_rate: Highest rate, reached after the warm-up; falls to zero along a cosine.
        weight_decay: AdamW's.
        warmup: Share of the steps in which the rate rises, 0 to 1.
        head_factor: The head learns this much faster than the rest.
        max_steps: Stop after so many steps, however many epochs that is; None for no limit.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup: float = 0.1
    head_factor: float = 1.0
    max_steps: int | None = None

    def steps_per_epoch(self, examples: int) -> int:
        """Optimiser steps in a pass over ``examples``."""
        return count_batches(examples, self.batch_size)

    def total_steps(self, examples: int) -> int:
        """Optimiser steps of the whole run."""
        steps = self.epochs * self.steps_per_epoch(examples)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True)
class EpochResult:
    """What an epoch gave.

    Attributes:
        epoch: Counted from 1.
        loss: Mean cross-entropy over the training examples seen.
        validation_accuracy: 0 to 1, after the epoch.
        seconds: Spent on the optimiser steps, without validation.
    """

    epoch: int
    loss: float
    validation_accuracy: float
    seconds: float


class Fit:
    """A training run that advances by one epoch per :meth:`run_epoch`.

    Parameters that don't require gradients stay as they are. The same seed gives the same batches in the same
    order with the same augmentation. ``history`` holds what each epoch gave, ``step_seconds`` how long each
    optimiser step took.

    Args:
        model: From model inputs to logits ``[n, classes]``; Accelerate moves it and sets its precision.
        task: The data.
        settings: Hyper-parameters.
        accelerator: An ``accelerate.Accelerator``.
        seed: Of order and augmentation.
        on_step: Called after each step with the steps done, the steps in all and the loss.
        head: The part of the model that ``head_factor`` is for.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: FitSettings,
        accelerator: Any,
        *,
        seed: int,
        on_step: OnStep,
        head: nn.Module | None = None,
    ) -> None:
        """See the class."""
        _check_settings(settings)
        self.total_steps = settings.total_steps(len(task.train.labels))
        self.history: list[EpochResult] = []
        self.step_seconds: list[float] = []
        self._task, self._settings, self._accelerator, self._on_step = task, settings, accelerator, on_step
        self._generator = torch.Generator().manual_seed(seed)
        self._steps_done = 0
        groups = _parameter_groups(model, head, settings)
        optimiser = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate)
        self.model, self._optimiser, self._schedule = accelerator.prepare(model, optimiser, schedule)

    @property
    def finished(self) -> bool:
        """Whether every step was taken."""
        return self._steps_done >= self.total_steps

    @property
    def seconds(self) -> float:
        """Spent on the optimiser steps of all epochs, without validation."""
        return sum(epoch.seconds for epoch in self.history)

    def run_epoch(self) -> EpochResult:
        """Train for an epoch, or for what is left of the steps, then validate.

        Raises:
            FloatingPointError: The loss is no longer finite.
        """
        self.model.train()
        started, total, seen = time.perf_counter(), 0.0, 0
        for inputs, labels in self._batches():
            total += self._step(inputs, labels) * len(labels)
            seen += len(labels)
        seconds = time.perf_counter() - started
        validation = self._task.validation
        right = self.predict(validation.inputs) == validation.labels
        result = EpochResult(len(self.history) + 1, total / seen, right.double().mean().item(), seconds)
        self.history.append(result)
        return result

    def predict(self, inputs: Tensor) -> Tensor:
        """The classes of stored inputs ``[n, ...]``: int64 ``[n]`` on the CPU."""
        self.model.eval()
        return run_batched(self.model, inputs, self._task.prepare, self._accelerator).argmax(dim=1)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        train = self._task.train
        order = torch.randperm(len(train.labels), generator=self._generator)
        for indices in cut(order, self._settings.batch_size)[: self.total_steps - self._steps_done]:
            yield self._task.augment(train.inputs[indices], self._generator), train.labels[indices]

    def _step(self, inputs: Tensor, labels: Tensor) -> float:
        started, device = time.perf_counter(), self._accelerator.device
        loss = F.cross_entropy(self.model(inputs.to(device)), labels.to(device))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"expected a finite loss, got {value} at step {self._steps_done + 1}; "
                f"lower the learning rate ({self._settings.learning_rate})"
            )
        self._accelerator.backward(loss)
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        self.step_seconds.append(time.perf_counter() - started)
        self._steps_done += 1
        self._on_step(self._steps_done, self.total_steps, value)
        return value

    def _rate(self, step: int) -> float:
        warmup = round(self._settings.warmup * self.total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def run_batched(
    model: nn.Module,
    inputs: Tensor,
    prepare: Callable[[Tensor], Tensor],
    accelerator: Any,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """The model's outputs for all inputs, a batch at a time.

    Args:
        model: In the mode (train or eval) it should run in, on the accelerator's device.
        inputs: ``[n, ...]``, stored inputs.
        prepare: From stored inputs to model inputs.
        accelerator: Gives device and precision.
        on_batch: Called after each batch with its size.

    Returns:
        float32 ``[n, ...]`` on the CPU.
    """
    outputs = []
    for batch in torch.split(inputs, _EVALUATION_BATCH):
        with accelerator.autocast():
            outputs.append(model(prepare(batch).to(accelerator.device)).float().cpu())
        on_batch(len(batch))
    return torch.cat(outputs)


def _parameter_groups(
    model: nn.Module, head: nn.Module | None, settings: FitSettings
) -> list[dict[str, Any]]:
    in_head = set(head.parameters()) if head is not None else set()
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter in in_head].append(parameter)
    rates = {False: settings.learning_rate, True: settings.learning_rate * settings.head_factor}
    return [{"params": groups[key], "lr": rates[key]} for key in groups if groups[key]]


def _check_settings(settings: FitSettings) -> None:
    for name in ("epochs", "batch_size", "max_steps"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}; give a positive number")
    if not 0 <= settings.warmup <= 1:
        raise ValueError(f"expected warmup as a share from 0 to 1, got {settings.warmup}")
