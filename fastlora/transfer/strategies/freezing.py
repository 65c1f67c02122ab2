"""Strategies that train some of the model's own layers."""

from torch import nn

from fastlora.anatomy.stages import stages
from fastlora.transfer.models.freezing import freeze_stages
from fastlora.transfer.unfreezing import GradualUnfreezing


def feature_extraction(model: nn.Module, head: str, *, train_batch_norm: bool = False) -> None:
    """Train the head alone: a linear probe.

    Args:
        model: A classifier, changed in place.
        head: Name of its last layer.
        train_batch_norm: Train BatchNorm layers too.
    """
    freeze_stages(model, model.get_submodule(head), 0, train_batch_norm=train_batch_norm)


def fine_tuning(model: nn.Module, head: str, *, train_batch_norm: bool = False, num_stages: int = 1) -> None:
    """Train the head and the last stages.

    Args:
        model: A classifier, changed in place.
        head: Name of its last layer.
        train_batch_norm: Train BatchNorm layers in frozen stages too.
        num_stages: How many of the last stages train.

    Raises:
        ValueError: There are fewer stages.
    """
    freeze_stages(model, model.get_submodule(head), num_stages, train_batch_norm=train_batch_norm)


def full(model: nn.Module, head: str, *, train_batch_norm: bool = True) -> None:
    """Train everything, BatchNorm included.

    Args:
        model: A classifier, changed in place.
        head: Name of its last layer.
        train_batch_norm: Changes nothing, as no stage is frozen.
    """
    layer = model.get_submodule(head)
    parts = stages(model, layer)
    freeze_stages(model, layer, len(parts), parts=parts, train_batch_norm=train_batch_norm)


def gradually(num_stages: int, epochs: int) -> GradualUnfreezing:
    """One more stage at a time, from the head down, evenly over the epochs.

    Howard & Ruder 2018 (https://arxiv.org/abs/1801.06146).

    Args:
        num_stages: Number of the model's stages.
        epochs: Epochs of the whole run.
    """
    return GradualUnfreezing.evenly(num_stages, epochs)


def after_the_probe(num_stages: int, epochs: int) -> GradualUnfreezing:
    """The head alone for a third of the epochs, then everything.

    Keeps more of what the features know about other data than training everything from the start (Kumar et
    al. 2022, https://arxiv.org/abs/2202.10054).

    Args:
        num_stages: Number of the model's stages.
        epochs: Epochs of the whole run, at least 2.

    Raises:
        ValueError: One epoch can't be divided.
    """
    if epochs < 2:
        raise ValueError(
            f"expected epochs >= 2 for lp_ft, got {epochs}; it trains the head first, then everything"
        )
    return GradualUnfreezing((max(1, epochs // 3),) * num_stages)
