"""Reads the frozen weight of another library's quantised layer by its attributes; never calls the layer."""

import sys
from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import nn

from fastlora.ops.weights.four_bit import read_four_bit
from fastlora.ops.weights.frozen import FrozenWeight

Reader = Callable[[nn.Module], FrozenWeight | str]

# classes of layers by the module that defines them: no library is imported that nobody uses
_LAYERS: dict[tuple[str, str], Reader] = {
    ("bitsandbytes.nn.modules", "Linear4bit"): read_four_bit,
}

_of_classes: WeakKeyDictionary[type, Reader] = WeakKeyDictionary()


def frozen_weight(layer: nn.Module, read_as: type[nn.Module] | None = None) -> FrozenWeight | str:
    """The weight of a quantised linear layer, as it is stored now, or why the layer is not understood.

    Nothing is kept of a layer, so it is free to move, to be loaded again or to go: its weight is read anew on
    every call, in about ten microseconds.

    Args:
        layer: bitsandbytes' ``Linear4bit`` (NF4 and FP4) and its subclasses that compute as it does.
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
        known = getattr(sys.modules.get(module), name, None)
        if known is not None and issubclass(kind, known):
            if kind.forward is known.forward:  # type: ignore[attr-defined]
                return read
            return lambda _: f"{kind.__name__}, a {name} with a forward of its own"
    return lambda _: f"{kind.__name__}, which is no quantised layer that is known"
