"""Gradual unfreezing: one more stage at a time, from the head down."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self

from torch import nn

from fastlora._core.option_checks import check_flag
from fastlora.anatomy.stages import Stage
from fastlora.transfer.models.freezing import freeze_stages


@dataclass(frozen=True)
class GradualUnfreezing:
    """When stages are unfrozen (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146).

    Holds no state: what trains follows from the epoch or step alone, so a resumed run goes on as the
    uninterrupted one would.

    Attributes:
        at: Epochs or steps, counted from 0, at whose start one more stage is unfrozen, the last stage first.
        unit: What ``at`` counts.
        train_batch_norm: Train the BatchNorm layers of frozen stages too.

    Raises:
        ValueError: ``at`` is empty, falls, or holds a negative number.
        TypeError: ``at`` holds something else than integers.

    Example:
        >>> schedule = GradualUnfreezing((1, 2, 4))
        >>> [schedule.trained_at(epoch) for epoch in range(6)]
        [0, 1, 2, 2, 3, 3]
    """

    at: tuple[int, ...]
    unit: Literal["epoch", "step"] = "epoch"
    train_batch_norm: bool = False

    def __post_init__(self) -> None:
        """Check the list."""
        check_flag("train_batch_norm", self.train_batch_norm)
        if self.unit not in ("epoch", "step"):
            raise ValueError(f"expected unit as 'epoch' or 'step', got {self.unit!r}")
        if any(isinstance(place, bool) or not isinstance(place, int) for place in self.at):
            raise TypeError(f"expected at as integers, got {list(self.at)}")
        if not self.at or min(self.at) < 0 or list(self.at) != sorted(self.at):
            raise ValueError(
                f"expected at as {self.unit}s from 0 on that don't fall, such as 1, 2, 4, got {list(self.at)}"
            )

    @classmethod
    def evenly(cls, stages: int, total: int, *, unit: Literal["epoch", "step"] = "epoch") -> Self:
        """Spread over a run: the head trains alone first, the stem's turn is last.

        Args:
            stages: How many stages to unfreeze.
            total: Epochs or steps of the whole run.
            unit: Whether ``total`` counts epochs or steps.

        Raises:
            ValueError: Either is below 1.

        Example:
            >>> GradualUnfreezing.evenly(4, 10).at
            (2, 4, 6, 8)
        """
        if stages < 1 or total < 1:
            raise ValueError(f"expected stages and total of at least 1, got {stages} and {total}")
        return cls(tuple(index * total // (stages + 1) for index in range(1, stages + 1)), unit)

    def trained_at(self, progress: int) -> int:
        """How many of the last stages train.

        Args:
            progress: The epoch or step, counted from 0.
        """
        return sum(place <= progress for place in self.at)

    def apply(self, model: nn.Module, head: nn.Module, progress: int) -> Sequence[Stage]:
        """Freeze and unfreeze a model's stages as an epoch or step wants it.

        Args:
            model: The model, changed in place.
            head: Classifier of the model, which always trains.
            progress: The epoch or step, counted from 0.

        Returns:
            The stages that train.

        Raises:
            ValueError: The schedule is for more stages than the model has; nothing is changed.
        """
        return freeze_stages(model, head, self.trained_at(progress), train_batch_norm=self.train_batch_norm)


@contextmanager
def all_unfrozen(model: nn.Module, head: nn.Module, unfreezing: GradualUnfreezing | None) -> Iterator[None]:
    """Let everything train that ever will, to count it; afterwards only what trains first.

    Args:
        model: The model, changed in place.
        head: Classifier of the model, which always trains.
        unfreezing: When stages begin to train; None leaves the model as it is.

    Raises:
        ValueError: The schedule is for more stages than the model has; nothing is changed.
    """
    if unfreezing is None:
        yield
        return
    unfreezing.apply(model, head, max(unfreezing.at))
    try:
        yield
    finally:
        unfreezing.apply(model, head, 0)
