"""What all ways to train share: pictures, device, seed, and whom to tell about the progress."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora._core.progress import Reporter
from fastlora.transfer.data.bundled import Splits
from fastlora.transfer.fit import OnStep
from fastlora.transfer.models.backbones import dinov2_vits14


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
