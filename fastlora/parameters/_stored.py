"""What quantised weights count as: the scalars they stand for, and the bytes that are stored for these."""

from typing import NamedTuple

from torch import Tensor, nn

from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.read import frozen_weight


class Stored(NamedTuple):
    """Of one parameter.

    Attributes:
        scalars: How many numbers it stands for.
        bytes: What it takes, with statistics that are no parameters themselves.
    """

    scalars: int
    bytes: int


def stored_weights(model: nn.Module) -> dict[int, Stored]:
    """What is stored otherwise than as one element a scalar, by the parameter's ``id``."""
    found = {}
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        # the values themselves, as most are, tell all that is asked here
        if weight is None or (type(weight) is nn.Parameter and weight.dtype.itemsize > 1):
            continue
        read = frozen_weight(module, getattr(module, "_read_as", None))
        if isinstance(read, FrozenWeight):
            counted = {p.data_ptr() for p in _plain(module) if p is not weight}
            sizes = [t.numel() * t.itemsize for t in read.tensors if t.data_ptr() not in counted]
            found[id(weight)] = Stored(read.shape.numel(), sum(sizes))
    return found


def scalars(parameter: Tensor, stored: dict[int, Stored]) -> int:
    """How many numbers a parameter stands for."""
    return stored[id(parameter)].scalars if id(parameter) in stored else parameter.numel()


def size(parameter: Tensor, stored: dict[int, Stored]) -> int:
    """Its bytes."""
    found = stored.get(id(parameter))
    return parameter.numel() * parameter.dtype.itemsize if found is None else found.bytes


def _plain(module: nn.Module) -> list[Tensor]:
    return [p for p in module._parameters.values() if type(p) is nn.Parameter]
