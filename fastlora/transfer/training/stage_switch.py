"""What trains at a step, where stages begin to train one by one."""

from torch import nn

from fastlora.transfer.unfreezing import GradualUnfreezing


class StageSwitch:
    """Freezes and unfreezes a model's stages as a run goes on.

    Args:
        model: Changed in place.
        head: Classifier of the model.
        unfreezing: When stages begin to train; None leaves everything as it is.
        steps_per_epoch: Optimiser steps of an epoch.

    Attributes:
        trained: Stages that train beside the head; None where that never changes.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module, unfreezing: GradualUnfreezing | None, steps_per_epoch: int
    ) -> None:
        """See the class."""
        self._model, self._head = model, head
        self._unfreezing, self._steps_per_epoch = unfreezing, steps_per_epoch
        self.trained: int | None = None

    def turn(self, step: int) -> bool:
        """Let the stages train whose time has come at a step; whether that changed anything."""
        if self._unfreezing is None:
            return False
        progress = step if self._unfreezing.unit == "step" else step // self._steps_per_epoch
        trained = self._unfreezing.trained_at(progress)
        if trained == self.trained:
            return False
        self._unfreezing.apply(self._model, self._head, progress)
        self.trained = trained
        return True
