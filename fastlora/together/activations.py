"""Which activations the op knows, torch's and those of transformers."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastlora.reference import Gate

_Reader = Callable[[Any], Gate | None]


def gate_of(activation: Any) -> Gate | None:
    """The op's name of an activation; None if it is none that the op knows."""
    read = reader_of(type(activation))
    return None if read is None else read(activation)


def reader_of(kind: Any) -> _Reader | None:
    """What tells the op's name of a class's activations; None for other classes, and patched ones."""
    name, named = kind.__name__, vars(sys.modules.get("transformers.activations", torch))
    read = _TORCH.get(kind)
    if read is None and named.get(name) is kind:
        read = _TRANSFORMERS.get(name)
    return read if read is not None and _is_its_own(kind) else None


def _is_its_own(kind: Any) -> bool:
    """Whether a class's forward stands in the class."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or code.co_qualname != f"{kind.__qualname__}.forward":
        return False
    return kind.forward.__globals__.get("__name__") == kind.__module__  # type: ignore[no-any-return]


def _gelu(activation: Any) -> Gate:
    return "gelu" if activation.approximate == "none" else "gelu_tanh"


# both have a slower formula in Python, too
def _exact(activation: Any) -> Gate | None:
    return "gelu" if activation.__dict__.get("act") is F.gelu else None


def _tanh(activation: Any) -> Gate | None:
    act = activation.__dict__.get("act")
    known = isinstance(act, functools.partial) and act.func is F.gelu and not act.args
    return "gelu_tanh" if known and act.keywords == {"approximate": "tanh"} else None


def _silu(activation: Any) -> Gate:
    return "silu"


def _gelu_new(activation: Any) -> Gate:
    return "gelu_new"


def _quick_gelu(activation: Any) -> Gate:
    return "quick_gelu"


_TORCH: dict[Any, _Reader] = {nn.GELU: _gelu, nn.SiLU: _silu}
_TRANSFORMERS: dict[str, _Reader] = {
    "SiLUActivation": _silu,
    "NewGELUActivation": _gelu_new,
    "QuickGELUActivation": _quick_gelu,
    "GELUActivation": _exact,
    "GELUTanh": _tanh,
    "PytorchGELUTanh": _tanh,
}
