"""PEFT's LoRA linear layers with the fused op in their forward: their classes, and which layers get them."""

import functools
from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch.distributed.tensor import DTensor

from fastlora.interop._peft_fused import Fused
from fastlora.interop._peft_parts import read
from fastlora.together.parts import PLAIN


class FusedLinear(Fused, Linear):
    """PEFT's ``lora.Linear``, fused."""


class FusedTorchaoLoraLinear(Fused, TorchaoLoraLinear):
    """PEFT's layer around a weight that torchao quantised, fused."""


_FUSED: dict[type, Any] = {Linear: FusedLinear, TorchaoLoraLinear: FusedTorchaoLoraLinear}


def fused_class(kind: type) -> Any:
    """The class of both for a class of PEFT's; None if there is none."""
    if kind.__module__ != "peft.tuners.lora.bnb":
        return _FUSED.get(kind)
    # imports bitsandbytes
    from fastlora.interop import _peft_bnb

    return _peft_bnb.FUSED.get(kind)


def why_not(layer: PeftLayer) -> str | None:
    """Why a PEFT layer is left as it is; None if the fused op serves it."""
    kind = type(layer)
    if not isinstance(layer, Fused) and fused_class(kind) is None:
        return f"lora.{kind.__name__}"
    name = f"lora.{_without_fused(kind).__name__}"
    if getattr(layer, "fan_in_fan_out", False):
        return f"{name} with fan_in_fan_out"
    if "forward" in vars(layer):
        return f"{name} with a forward of its own"
    # sharded weights are whole again when the layer is called
    found = read(layer, layer.lora_A.keys(), accepted={*PLAIN, DTensor})
    if not isinstance(found, str):
        return None
    return f"{name} {found}" if found.startswith("on ") else f"{name} with {found}"


def fuse(layer: Any, *, one_mask: bool) -> None:
    """Change a layer's class to the one of both, if it has not one yet; it may have one mask with others."""
    if not isinstance(layer, Fused):
        layer.__class__ = fused_class(type(layer))
    layer._ask_for_one_mask(asked=one_mask)


def unfuse(layer: PeftLayer) -> None:
    """Give a layer PEFT's class back, if it lost it."""
    if isinstance(layer, Fused):
        layer._ask_for_one_mask(asked=False)
        layer.__class__ = _without_fused(type(layer))


@functools.cache
def _without_fused(kind: type) -> Any:
    """A class with PEFT's for that of both: FSDP and parametrizations make subclasses of what they find."""
    if Fused in kind.__bases__:
        return kind.__bases__[-1]
    if not issubclass(kind, Fused):
        return kind
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(_without_fused(base) for base in kind.__bases__)
    metaclass: Any = type(kind)
    return metaclass(kind.__name__.replace(Fused.__name__, ""), bases, own)
