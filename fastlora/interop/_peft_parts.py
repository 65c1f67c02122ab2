"""What the fused op reads out of a PEFT layer, whose modules it does not call."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from fastlora._core.checks import FLOATING_DTYPES
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.read import frozen_weight, is_compressed
from fastlora.together.parts import DROPOUT, HOOKS, PLAIN, Adapter, Parts

_Kinds = Mapping[type[nn.Module], Any]
_Found = tuple[Tensor, Tensor | None]
_Base = tuple[Tensor | FrozenWeight, Tensor | None]

# the classes that PEFT puts in with what they compute, so that whoever patches one of these is noticed
_LINEAR: _Kinds = {nn.Linear: nn.Linear.forward}
_DORA: _Kinds = {DoraLinearLayer: DoraLinearLayer.forward}
# quantised layers, whose libraries are not imported for their sake: as they were when the first one was met
_QUANTISED: dict[type[nn.Module], Any] = {}


def read(layer: Any, names: Collection[str], *, accepted: Collection[type] = PLAIN) -> Parts | str:
    """All that a call depends on, or the first thing found that only PEFT computes.

    Runs on every call: it goes past ``nn.Module.__getattr__``, and writes no text unless it has a reason.

    Args:
        layer: PEFT's LoRA layer around a linear one.
        names: Names of the layer's adapters that take part.
        accepted: Types of dense weights.
    """
    base = _base(layer._modules["base_layer"], accepted)
    if isinstance(base, str):
        return base
    adapters = []
    for name in names:
        adapter = _adapter(layer, name, accepted)
        if isinstance(adapter, str):
            return adapter
        if adapter.magnitude is not None and isinstance(base[0], FrozenWeight):
            return "DoRA beside a quantised weight"
        adapters.append(adapter)
    return Parts(*base, adapters)


def _base(module: Any, accepted: Collection[type]) -> _Base | str:
    """Weight and bias of the base layer, the weight dense or as its quantiser stores it."""
    stored, compressed = module._parameters.get("weight"), is_compressed(module)
    # FSDP1's are no parameters
    if type(module) is nn.Linear and not compressed and (stored is None or type(stored) in accepted):
        return _linear("base_layer", module, accepted)
    weight = frozen_weight(module)
    if isinstance(weight, str):
        plain = type(module) is nn.Linear and not compressed
        return _linear("base_layer", module, accepted) if plain else f"on {weight}"
    kind = type(module)
    if kind not in _QUANTISED:
        _QUANTISED[kind] = kind.forward
    bias = module.bias
    reason = _changed("base_layer", module, _QUANTISED, own_forward=compressed)
    if reason is None and bias is not None:
        reason = _strange("base_layer", bias, accepted)
    return reason or (weight, bias)


def _adapter(layer: Any, name: str, accepted: Collection[type]) -> Adapter | str:
    modules = layer._modules
    down = _linear("lora_A", modules["lora_A"]._modules[name], accepted)
    if isinstance(down, str):
        return down
    up = _linear("lora_B", modules["lora_B"]._modules[name], accepted)
    if isinstance(up, str):
        return up
    drop = modules["lora_dropout"]._modules[name]
    reason = _changed("lora_dropout", drop, DROPOUT)
    if reason is not None:
        return reason
    (lora_A, bias_A), (lora_B, bias) = down, up
    scaling = layer.scaling[name]
    # a tensor may want a gradient, or change within a compiled graph
    if not isinstance(scaling, int | float) or not abs(scaling) < float("inf"):
        return f"scaling of {type(scaling).__name__ if isinstance(scaling, Tensor) else scaling}"
    if bias_A is not None:
        return "a bias in lora_A"
    if lora_A.dtype is not lora_B.dtype:
        return "lora_A and lora_B of different dtypes"
    dropout = float(drop.p) if type(drop) is nn.Dropout and drop.training else 0.0
    if dropout and drop.inplace:
        return "dropout in place"
    if name not in layer.lora_variant:
        return Adapter(lora_A, lora_B, bias, scaling, dropout, None)
    magnitude = _magnitude(layer, name, bias, accepted)
    if isinstance(magnitude, str):
        return magnitude
    # PEFT's DoRA asks the layer, too, whether it trains
    return Adapter(lora_A, lora_B, bias, scaling, dropout if layer.training else 0.0, magnitude)


def _magnitude(layer: Any, name: str, bias: Tensor | None, accepted: Collection[type]) -> Tensor | str:
    variant = layer.lora_variant[name]
    kind = variant if isinstance(variant, type) else type(variant)
    if kind is not DoraLinearVariant:
        return kind.__name__
    # PEFT adds it to every column of the update whose norm it takes
    if bias is not None:
        return "lora_bias beside DoRA"
    module = layer.lora_magnitude_vector[name]
    reason = _changed("lora_magnitude_vector", module, _DORA)
    return reason or _strange("lora_magnitude_vector", module.weight, accepted) or module.weight


def _linear(part: str, module: Any, accepted: Collection[type]) -> _Found | str:
    reason = _changed(part, module, _LINEAR)
    if reason is not None:
        return reason
    parameters = module._parameters
    # FSDP1 takes the Parameters out and sets tensors in their place
    if "weight" in parameters and "bias" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
    else:
        weight, bias = module.weight, module.bias
    reason = _strange(part, weight, accepted)
    if reason is None and bias is not None:
        reason = _strange(part, bias, accepted)
    return reason or (weight, bias)


def _changed(part: str, module: nn.Module, kinds: _Kinds, *, own_forward: bool = False) -> str | None:
    """What would notice that a module is not called; ``own_forward``: its own one is its quantiser's."""
    kind, own = type(module), module.__dict__
    if kinds.get(kind) is not kind.forward:
        return f"{kind.__name__} as {part}"
    if "forward" in own and not own_forward:
        return f"a forward of its own in {part}"
    if any([own[name] for name in HOOKS]):
        return f"hooks on {part}"
    return None


def _strange(part: str, tensor: Tensor, accepted: Collection[type]) -> str | None:
    """What is unusual about a weight: packed, quantised or sparse."""
    if type(tensor) not in accepted:
        return f"{type(tensor).__name__} in {part}"
    if tensor.layout is not torch.strided or tensor.dtype not in FLOATING_DTYPES:
        return f"{tensor.dtype} ({tensor.layout}) in {part}"
    return None
