"""Hyper-parameters of a training run."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastlora.transfer.training.batching import count_batches

Schedule = Literal["cosine", "linear", "one_cycle", "constant"]
Monitor = Literal["accuracy", "balanced_accuracy", "loss"]
Optimizer = Literal["adamw", "sgd"]
Precision = Literal["auto", "no", "bf16", "fp16"]
Sharding = Literal["ddp", "fsdp2"]

_CHOICES = {
    "schedule": Schedule,
    "monitor": Monitor,
    "optimizer": Optimizer,
    "precision": Precision,
    "sharding": Sharding,
}
# what fits into 32 bits, which torch and the operating system count in here and there
LARGEST_COUNT = 2**31 - 1
# NumPy takes no larger seed
_MOST = {"workers": 1024, "seed": 2**32 - 1}
_COUNTS = ("epochs", "batch_size", "accumulation", "max_steps", "patience", "checkpoint_every")
# how a run computes or is watched, not what it computes: a resumed run may have others
NOT_COMPARED = ("workers", "checkpoint_every", "sharding")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Hyper-parameters of a training run; rates and decays are explained by ``parameter_groups``.

    Attributes:
        epochs: Passes over the training examples.
        batch_size: Examples of an optimiser step, over all processes and parts.
        lr: Highest learning rate.
        optimizer: AdamW, or SGD with Nesterov momentum 0.9.
        weight_decay: Decay of matrices and convolutions.
        layer_decay: Learning rate of a stage as a multiple of the next one's, nearer to the head; above 0, at
            most 1, where all learn alike.
        head_factor: Learning rate of the head as a multiple of ``lr``.
        lora_plus_ratio: Learning rate of LoRA's B as a multiple of A's (LoRA+).
        schedule: Course of the rate after a linear warm-up; ``"one_cycle"`` is torch's ``OneCycleLR``.
        warmup: Share of the steps in which the rate rises, 0 to 1.
        accumulation: Parts in which a batch is computed, to save memory; the result is the whole batch's.
        clip_norm: Gradients are scaled down to this norm; 0 leaves them.
        precision: Precision of the products; ``"auto"`` takes 16 bits where the hardware multiplies them.
        label_smoothing: Share of a label spread over all classes, in [0, 1).
        mixup: Alpha of mixup's Beta distribution (https://arxiv.org/abs/1710.09412); 0 switches it off.
        class_weights: Count every class alike, however many examples it has.
        ema: Decay of an exponential moving average of the weights, 0.999 say; it is what is validated and
            kept. Without it there is none.
        patience: Stop after so many epochs without a better ``monitor``; without it never before the last.
        monitor: What makes an epoch the best one; among equals the lower validation loss does.
        restore_best: End with the weights of the best epoch instead of the last one's.
        max_steps: Stop after so many optimiser steps, however many epochs that is; without it
            ``epochs`` decides.
        checkpoint_every: Optimiser steps between checkpoints; without it one is written after each epoch.
        workers: Processes that load pictures; 0 loads them in this one.
        sharding: What each of several processes holds: a whole copy, or parameters in pieces.
        seed: Seed of order, augmentation, mixup and dropout.

    Raises:
        ValueError: A number out of range or an unknown choice.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    head_factor: float = 1.0
    lora_plus_ratio: float = 1.0
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    accumulation: int = 1
    clip_norm: float = 1.0
    precision: Precision = "auto"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    class_weights: bool = False
    ema: float | None = None
    patience: int | None = None
    monitor: Monitor = "accuracy"
    restore_best: bool = True
    max_steps: int | None = None
    checkpoint_every: int | None = None
    workers: int = 0
    sharding: Sharding = "ddp"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every number."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"expected {name} out of {', '.join(get_args(choices))}, got {value!r}")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"expected {name} as an integer of at least 1, got {value!r}")
            if value is not None and value > LARGEST_COUNT:
                raise ValueError(f"expected {name} of at most {LARGEST_COUNT:,}, got {value:,}")
        _check_range("warmup", self.warmup, 0.0, 1.0, closed=True)
        _check_range("label_smoothing", self.label_smoothing, 0.0, 1.0)
        _check_range("mixup", self.mixup, 0.0, math.inf)
        if self.ema is not None:
            _check_range("ema", self.ema, 0.0, 1.0)
        _check_range("clip_norm", self.clip_norm, 0.0, math.inf)
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"expected {name} from 0 to {most:,}, got {value:,}")
        if self.schedule == "one_cycle" and not 0 < self.warmup < 1:
            raise ValueError(
                f"expected warmup above 0 and below 1 for one_cycle, got {self.warmup}; 0.3 is usual"
            )

    def steps_per_epoch(self, examples: int) -> int:
        """Optimiser steps in a pass over ``examples``."""
        return count_batches(examples, self.batch_size)

    def total_steps(self, examples: int) -> int:
        """Optimiser steps of the whole run, unless it stops early."""
        steps = self.epochs * self.steps_per_epoch(examples)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def _check_range(name: str, value: float, low: float, high: float, *, closed: bool = False) -> None:
    if not (low <= value < high or (closed and value == high)):
        raise ValueError(f"expected {name} from {low:g} to {high:g}, got {value!r}")
