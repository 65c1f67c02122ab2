"""The learning rate over a run, as a scheduler of torch's."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from fastlora.transfer.training.settings import TrainSettings


def make_schedule(optimizer: Optimizer, settings: TrainSettings, total_steps: int) -> LRScheduler:
    """The settings' schedule for all groups of an optimiser, each from its own rate."""
    if settings.schedule == "one_cycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        # one step more than it takes: torch steps once while it is made; and it divides by the length of
        # either phase, which must not be nothing
        total = max(total_steps + 1, 4)
        rising = min(max(settings.warmup, 2 / total), 1 - 1 / total)
        return OneCycleLR(optimizer, rates, total_steps=total, pct_start=rising)
    return LambdaLR(
        optimizer, lambda step: rate_factor(settings.schedule, step, total_steps, settings.warmup)
    )


def rate_factor(schedule: str, step: int, total_steps: int, warmup: float) -> float:
    """By what the rate is multiplied before the step number ``step``, counted from 0.

    Example:
        >>> [round(rate_factor("linear", step, 4, 0.0), 2) for step in range(4)]
        [1.0, 0.75, 0.5, 0.25]
    """
    rising = round(warmup * total_steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(1, total_steps - rising)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0 if schedule == "constant" else max(0.0, 1.0 - progress)
