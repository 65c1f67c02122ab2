"""Freezing done right: what is frozen neither trains nor moves its running statistics."""

from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar, cast

from torch import nn

from fastlora.anatomy.stages import Stage, stages

Model = TypeVar("Model", bound=nn.Module)

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class KeepsFrozenInEval(nn.Module):
    """A model whose frozen parts stay in eval mode through :meth:`train`.

    ``requires_grad=False`` alone leaves a BatchNorm in train mode, where it normalises with the batch and
    moves its running statistics. Here a module without anything trainable in it stays in eval mode, with its
    dropout and stochastic depth off. Dropout of a module that is trained in part stays on.
    """

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is not frozen."""
        super().train(mode)
        if mode:
            _settle(self)
        return self


def keep_frozen_in_eval(model: Model) -> Model:
    """Make a model keep its frozen parts in eval mode, in place; it stays an instance of its class.

    The model's class becomes a subclass of what it was, as in PyTorch's ``parametrize`` and ``fully_shard``;
    names, ``repr``, copies and pickles stay as they are.

    Args:
        model: Any model.

    Returns:
        The same model.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = keep_frozen_in_eval(resnet18().requires_grad_(False)).train()
        >>> model.bn1.training
        False
    """
    kind = type(model)
    if not issubclass(kind, KeepsFrozenInEval):
        model.__class__ = _frozen_kind(kind)
    return model.train(model.training)


def freeze_stages(
    model: nn.Module,
    head: nn.Module,
    trained: int,
    *,
    parts: list[Stage] | None = None,
    train_batch_norm: bool = False,
) -> list[Stage]:
    """Train the head and the last stages, freeze the others.

    Args:
        model: The model that holds the head and the stages, changed in place.
        head: Classifier of the model, which always trains.
        trained: How many of the last stages train, from 0.
        parts: All stages from input to output; None finds them.
        train_batch_norm: Train the BatchNorm layers of frozen stages too, weights and running statistics.

    Returns:
        The stages that train.

    Raises:
        ValueError: There are fewer stages.
    """
    parts = stages(model, head) if parts is None else parts
    if isinstance(trained, bool) or not isinstance(trained, int) or not 0 <= trained <= len(parts):
        raise ValueError(
            f"expected the number of last stages to train from 0 to {len(parts)}, got {trained!r}; "
            f"from input to output they are {', '.join(stage.name for stage in parts)}"
        )
    chosen = parts[len(parts) - trained :]
    model.requires_grad_(False)
    _train(head.parameters())
    for stage in chosen:
        _train(stage.all_parameters())
    if train_batch_norm:
        for module in model.modules():
            if isinstance(module, _BATCH_NORMS):
                _train(module.parameters())
    model.train(model.training)
    return chosen


def _train(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(parameter.is_floating_point())


def _settle(module: nn.Module) -> None:
    """Set to eval mode what has nothing trainable in it, and bare statistics beside frozen weights."""
    trainable = [p.requires_grad for p in module.parameters()]
    if trainable and not any(trainable):
        module.eval()
        return
    for child in module.children():
        if isinstance(child, nn.modules.batchnorm._NormBase) and not child.affine:
            child.train(child.training and all(trainable))
        else:
            _settle(child)


_kinds: dict[type, type] = {}


def _frozen_kind(kind: type) -> type:
    if kind not in _kinds:

        def reduce(self: nn.Module) -> tuple[Callable[..., Any], tuple[type], dict[str, Any]]:
            # the class made here can't be found by its name when a pickle is read
            return _restore, (kind,), self.__dict__

        members = {"__reduce__": reduce, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _kinds[kind] = type(kind.__name__, (KeepsFrozenInEval, kind), members)
    return _kinds[kind]


def _restore(kind: type) -> nn.Module:
    made = _frozen_kind(kind)
    return cast(nn.Module, object.__new__(made))
