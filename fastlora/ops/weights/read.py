"""Reads the frozen weight of another library's quantised layer by its attributes; never calls the layer."""

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fastlora.ops.weights.eight_bit import (
    read_compressed,
    read_compressed_fp8,
    read_llm_int8,
    read_transformers_fp8,
)
from fastlora.ops.weights.four_bit import read_four_bit
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.torchao import read_float8, read_int8, read_nf4

# where a layer that computes in a quantised one's place keeps the forward which that one alone had
FORWARD_OF_BASE = "_forward_of_base"

Reader = Callable[[Any], FrozenWeight | str]

# classes of layers by the module that defines them: no library is imported that nobody uses
_LAYERS: dict[tuple[str, str], Reader] = {
    ("bitsandbytes.nn.modules", "Linear4bit"): read_four_bit,
    ("bitsandbytes.nn.modules", "Linear8bitLt"): read_llm_int8,
    ("transformers.integrations.finegrained_fp8", "FP8Linear"): read_transformers_fp8,
    ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"): read_compressed_fp8,
}
# and of tensors that plain layers hold
_TENSORS: dict[str, Reader] = {"Int8Tensor": read_int8, "Float8Tensor": read_float8, "NF4Tensor": read_nf4}

_of_classes: WeakKeyDictionary[type, Reader] = WeakKeyDictionary()


def frozen_weight(layer: nn.Module, read_as: type[nn.Module] | None = None) -> FrozenWeight | str:
    """The weight of a quantised linear layer, as it is stored now, or why the layer is not understood.

    Nothing is kept of a layer, so it is free to move, to be loaded again or to go: its weight is read anew on
    every call, in about ten microseconds. Hooks, and a forward that this layer alone has, are not looked at;
    :func:`is_compressed` knows the one that a quantiser puts there.

    Args:
        layer: bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``, transformers' ``FP8Linear`` and
            ``CompressedTensorsFP8Linear``, their subclasses that compute as they do, or an ``nn.Linear`` with
            torchao's ``Int8Tensor``, ``Float8Tensor`` or ``NF4Tensor``, or that compressed-tensors has
            compressed to 8 bits.
        read_as: The class of these whose attributes the layer has, beside a forward of its own; its own class
            without it.

    Returns:
        The weight, or the words of a warning: "Linear4bit with weights repacked for inference".
    """
    kind = read_as or type(layer)
    read = _of_classes.get(kind)
    if read is None:
        read = _of_classes[kind] = _reader(kind)
    return read(layer)


def _reader(kind: type) -> Reader:
    for (module, name), read in _LAYERS.items():
        known: Any = getattr(sys.modules.get(module), name, None)
        if known is not None and issubclass(kind, known):
            return read if _computes_as(kind, known) else _unknown(f"a {name} with a forward of its own")
    if issubclass(kind, nn.Linear) and _computes_as(kind, nn.Linear):
        return _read_linear
    return _unknown("which is no quantised layer that is known")


def _computes_as(kind: Any, known: Any) -> bool:
    return bool(kind.forward is known.forward)


def _unknown(why: str) -> Reader:
    return lambda layer: f"{type(layer).__name__}, {why}"


def _read_linear(layer: nn.Module) -> FrozenWeight | str:
    if is_compressed(layer):
        return read_compressed(layer)
    weight = type(layer._parameters.get("weight"))
    read = _TENSORS.get(weight.__name__) if weight.__module__.split(".")[0] == "torchao" else None
    if read is None:
        return f"{type(layer).__name__} with a weight of class {weight.__name__}"
    return read(layer._parameters["weight"])


def is_compressed(layer: nn.Module) -> bool:
    """Whether the forward that this layer alone has is compressed-tensors' own, or was before LoRA's.

    Args:
        layer: Any layer.
    """
    function = layer.__dict__.get(FORWARD_OF_BASE)
    if function is None:
        own = layer.__dict__.get("forward")
        if own is None:
            return False
        function = getattr(own, "__func__", None)
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("compressed_tensors.")
