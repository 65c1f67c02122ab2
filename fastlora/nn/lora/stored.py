"""The weight of a linear layer as it is stored: its values, or what a quantiser made of them."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora._core.checks import FLOATING_DTYPES
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.read import frozen_weight

_PLAIN = (nn.Parameter, Tensor)


def is_dense(linear: Any) -> bool:
    """Whether a linear layer's weight is its values."""
    return _holds_values(linear, linear.weight)


def stored_weight(linear: Any, read_as: type[nn.Module] | None = None) -> Tensor | FrozenWeight:
    """A linear layer's weight to compute with: its values, or as its quantiser stores it.

    Args:
        linear: With weight ``[out, in]``, dense or quantised.
        read_as: The quantiser's class where the layer is of one with another forward.

    Raises:
        RuntimeError: It holds something else than values, and can't be read.
    """
    # on every call: past nn.Module.__getattr__, where it is a parameter
    weight: Any = linear._parameters.get("weight")
    if weight is None:
        weight = linear.weight
    if _holds_values(linear, weight):
        return cast(Tensor, weight)
    found = frozen_weight(linear, read_as)
    if isinstance(found, FrozenWeight):
        return found
    # sharded tensors and other quantisers' compute for themselves
    if weight.dtype in FLOATING_DTYPES and weight.shape == (linear.out_features, linear.in_features):
        return cast(Tensor, weight)
    raise RuntimeError(f"expected a frozen weight that can be read, got {found}; load the model again")


def _holds_values(linear: Any, weight: Any) -> bool:
    plain = type(weight) in _PLAIN and weight.dtype in FLOATING_DTYPES
    # bytes may be stored as floats
    return plain and weight.shape == (linear.out_features, linear.in_features)


def requantised(weight: Any, dense: Tensor) -> nn.Parameter:
    """Other values quantised as bitsandbytes' Parameter ``weight`` is, on its device.

    Args:
        weight: A ``Params4bit`` or ``Int8Params``.
        dense: ``[out, in]`` in float32.
    """
    if type(weight).__name__ == "Params4bit":
        names = ("quant_type", "blocksize", "compress_statistics", "quant_storage")
        settings = {name: getattr(weight, name) for name in names}
        # its float32 would be what it dequantises to
        dense = dense.to(weight.quant_state.dtype)
    else:
        settings = {"has_fp16_weights": False}
        dense = dense.half()
    made: nn.Parameter = type(weight)(dense.cpu(), requires_grad=False, **settings).to(weight.device)
    return made


def fresh_statistics(linear: Any, weight: Any) -> dict[str, Any]:
    """The attributes in which bitsandbytes' layer keeps statistics of its weight, for another weight.

    Args:
        linear: A ``Linear4bit`` or ``Linear8bitLt``; it is not changed.
        weight: :func:`requantised` just now.
    """
    if type(weight).__name__ == "Params4bit":
        return {"quant_state": weight.quant_state}
    state = copy.copy(linear.state)
    # the first call takes the weight's
    state.CB = state.SCB = None
    return {"state": state}


def can_requantise(weight: object) -> bool:
    """Whether :func:`requantised` knows this class of Parameters."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def merged_dtype(linear: Any, stored: FrozenWeight) -> torch.dtype:
    """What a merged weight stands in a quantised one's place in: the plain layer's dtype, if it is known.

    Args:
        linear: The quantised layer.
        stored: What its weight is stored as, and what that stands for.
    """
    weight = linear.weight
    state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
    # bytes may be stored as floats; torchao's tensors have the dtype that they stand for
    nominal = weight if state is None else state
    dtypes = (nominal.dtype, getattr(linear.bias, "dtype", None), stored.compute_dtype)
    return next((dtype for dtype in dtypes if dtype in FLOATING_DTYPES), torch.bfloat16)
