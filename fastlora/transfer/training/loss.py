"""Cross-entropy over a batch that is computed in parts, with class weights, smoothing and mixup."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.transfer.data import LabelledImages, class_weights
from fastlora.transfer.training.randomness import derived_seed
from fastlora.transfer.training.settings import TrainSettings


@dataclass(frozen=True)
class Loss:
    """The mean cross-entropy of a batch, as a sum over its parts.

    With mixup (Zhang et al. 2018, https://arxiv.org/abs/1710.09412) neighbours 0 and 1, 2 and 3, … are mixed
    with each other, with one share for the batch; the last of an odd batch is left as it is.

    Attributes:
        class_weights: float32 ``[classes]``, or None.
        label_smoothing: In [0, 1).
        mixup: Alpha; 0 mixes nothing.
        seed: Seed of the shares.
    """

    class_weights: Tensor | None
    label_smoothing: float
    mixup: float
    seed: int

    @classmethod
    def of(cls, train: LabelledImages, settings: TrainSettings, device: torch.device) -> Self:
        """The settings' loss, for the classes of the training pictures."""
        weights = class_weights(train.labels, len(train.classes)) if settings.class_weights else None
        on_device = None if weights is None else weights.to(device)
        return cls(on_device, settings.label_smoothing, settings.mixup, settings.seed)

    def share(self, step: int) -> float:
        """How much of an example is itself at this step, 0 to 1; 1 without mixup."""
        if self.mixup == 0:
            return 1.0
        return float(
            np.random.default_rng(derived_seed(self.seed, "mixup", step)).beta(self.mixup, self.mixup)
        )

    def weight(self, labels: Sequence[int], share: float) -> float:
        """What the losses of a batch's examples, in their order, are divided by."""
        if self.class_weights is None:
            return float(len(labels))
        weights = self.class_weights.cpu().double()[list(labels)]
        filled = torch.cat([weights, weights[-1:]]) if len(labels) % 2 else weights
        mixed = share * weights + (1 - share) * swapped(filled)[: len(labels)]
        return float(mixed.sum())

    def sum(self, logits: Tensor, labels: Tensor, counted: Tensor, share: float) -> Tensor:
        """Summed loss of a part.

        Args:
            logits: ``[b, classes]``, of inputs mixed by :meth:`mix` with the same share.
            labels: Classes of the inputs, int64 ``[b]``.
            counted: ``[b]``, 0 for examples that only fill up.
            share: How much of each example is its own, from :meth:`share`.
        """
        losses = self._each(logits, labels)
        if share != 1.0:
            losses = share * losses + (1 - share) * self._each(logits, swapped(labels))
        return (losses * counted).sum()

    @staticmethod
    def mix(inputs: Tensor, share: float) -> Tensor:
        """Inputs ``[b, ...]`` mixed with their neighbours."""
        return inputs if share == 1.0 else torch.lerp(swapped(inputs), inputs, share)

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, self.class_weights, reduction="none", label_smoothing=self.label_smoothing
        )


def swapped(values: Tensor) -> Tensor:
    """Neighbours changed places along the first dimension, which is even.

    Example:
        >>> swapped(torch.arange(4))
        tensor([1, 0, 3, 2])
    """
    pairs: Tensor = values.unflatten(0, (-1, 2))
    return pairs.flip(1).flatten(0, 1)
