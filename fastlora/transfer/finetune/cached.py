"""Train the head alone on features that are computed once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastlora.transfer.data import LabelledImages, cached_features


class HeadOnly(nn.Module):
    """A classifier without its backbone: from features ``[B, F]`` to logits.

    Args:
        head: Last layers of a model, shared with it.
    """

    def __init__(self, head: nn.Module) -> None:
        """See the class."""
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.head(features)
        return logits


def features_of(
    model: nn.Module,
    head: nn.Module,
    images: LabelledImages,
    folder: Path,
    batch_size: int,
    on_done: Callable[[int, int], None],
    accelerator: Any,
) -> LabelledImages:
    """The same examples as what the head reads of them, for :class:`HeadOnly`.

    They are computed in the precision of training and prediction, and kept in float32.

    Args:
        model: Frozen but for its head.
        head: Inside the model.
        images: With the evaluation transform.
        folder: Keeps the features.
        batch_size: Pictures at a time.
        on_done: Called with how many pictures are done, of how many.
        accelerator: An ``accelerate.Accelerator``.
    """

    def read(batch: Tensor) -> Tensor:
        with accelerator.autocast():
            return read_by(model, head, batch).float()

    features, _ = cached_features(
        read,
        model,
        images,
        folder,
        batch_size=batch_size,
        head=head,
        precision=str(accelerator.mixed_precision),
        on_done=on_done,
    )
    return replace(images, read=Rows(features), transform=None)


@dataclass(frozen=True)
class Rows:
    """Reads stored features instead of pictures.

    Attributes:
        features: ``[n, F]``.
        draws_nothing: True: reading them draws no random numbers.
    """

    features: Tensor
    draws_nothing: ClassVar[bool] = True

    def __call__(self, index: int) -> Tensor:
        """Those of one example."""
        return self.features[index]


def read_by(model: nn.Module, head: nn.Module, batch: Tensor) -> Tensor:
    """What the head of a model reads of a batch."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0].detach())

    handle = head.register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            model(batch)
    finally:
        handle.remove()
    return caught[0]
