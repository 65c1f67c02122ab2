"""Strategies that train some of the model's own layers."""

from torch import nn

from fastlora.anatomy.stages import stages
from fastlora.transfer.models.freezing import freeze_stages
from fastlora.transfer.unfreezing import GradualUnfreezing


def feature_extraction(model: nn.Module, head: str, *, train_batch_norm: bool = False) -> None:
    """Train the head alone: a linear probe."""
    _train_last(model, head, 0, train_batch_norm)


def fine_tuning(model: nn.Module, head: str, *, train_batch_norm: bool = False, num_stages: int = 1) -> None:
    """Train the head and the last ``num_stages`` stages."""
    _train_last(model, head, num_stages, train_batch_norm)


def full(model: nn.Module, head: str, *, train_batch_norm: bool = True) -> None:
    """Train everything, BatchNorm included."""
    count = len(stages(model, model.get_submodule(head)))
    _train_last(model, head, count, train_batch_norm)


def gradual(model: nn.Module, head: str, *, train_batch_norm: bool = False) -> None:
    """Begin as :func:`feature_extraction`.

    Howard & Ruder 2018 (https://arxiv.org/abs/1801.06146) then unfreeze one more stage at a time, from the
    head down.
    """
    _train_last(model, head, 0, train_batch_norm)


def lp_ft(model: nn.Module, head: str, *, train_batch_norm: bool = False) -> None:
    """Begin as :func:`feature_extraction`; once the head has converged, train everything.

    Keeps more of what the features know about other data than :func:`full` (Kumar et al. 2022,
    https://arxiv.org/abs/2202.10054).
    """
    _train_last(model, head, 0, train_batch_norm)


def gradually(num_stages: int, epochs: int) -> GradualUnfreezing:
    """When :func:`gradual` unfreezes: evenly over the epochs."""
    return GradualUnfreezing.evenly(num_stages, epochs)


def after_the_probe(num_stages: int, epochs: int) -> GradualUnfreezing:
    """When :func:`lp_ft` unfreezes: everything after a third of the epochs.

    Raises:
        ValueError: One epoch can't be divided.
    """
    if epochs < 2:
        raise ValueError(
            f"expected epochs >= 2 for lp_ft, got {epochs}; it trains the head first, then everything"
        )
    return GradualUnfreezing((max(1, epochs // 3),) * num_stages)


def _train_last(model: nn.Module, head: str, count: int, train_batch_norm: bool) -> None:
    freeze_stages(model, model.get_submodule(head), count, train_batch_norm=train_batch_norm)
