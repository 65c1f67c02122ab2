"""What a linear layer with LoRA computes, from its parts, on the fused ops."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.functional import Projection, gated_lora_linear, lora_linear, shared_lora_linear
from fastlora.ops.runtime import in_dtype
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.reference import Gate
from fastlora.together.parts import PLAIN, Adapter, LayerOfParts, Parts


def lora(x: Tensor, parts: Parts) -> Tensor:
    """The layer's output for x ``[..., in_features]``, still to be completed."""
    weight, bias, lora_A, lora_B, scaling, dropout = _projection(parts)
    y = lora_linear(x, weight, bias, lora_A, lora_B, scaling=scaling, dropout=dropout)
    for adapter in parts.adapters[1:] if has_masks_apart(parts) else ():
        dropped = F.dropout(x.to(adapter.lora_A.dtype), adapter.dropout)
        update = F.linear(F.linear(dropped, adapter.lora_A), adapter.lora_B, adapter.bias)
        y = (y + adapter.scaling * update).to(y.dtype)
    return y


def lora_of_several(x: Tensor, layers: list[Parts], *, one_mask: bool) -> tuple[Tensor, ...]:
    """Each layer's output for one x, still to be completed, of layers without masks apart."""
    return shared_lora_linear(x, [_projection(parts) for parts in layers], one_mask=one_mask)


def of_gated(layer: LayerOfParts, gate: Tensor, up: Tensor | None, activation: Gate) -> Tensor | None:
    """A layer's output for act(gate)·up, or act(gate), which is not kept; None where the op serves no such
    call.
    """
    plain = up is None or (gate.shape == up.shape and gate.dtype is up.dtype and type(up) in PLAIN)
    parts = layer._parts_of(gate) if plain else None
    if parts is None or has_masks_apart(parts) or parts.adapters[0].magnitude is not None:
        return None
    weight, bias, lora_A, lora_B, scaling, dropout = _projection(parts)
    options: dict[str, Any] = {"activation": activation, "scaling": scaling, "dropout": dropout}
    return completed(gated_lora_linear(gate, up, weight, bias, lora_A, lora_B, **options), gate, parts)


def has_masks_apart(parts: Parts) -> bool:
    """Whether every adapter has a mask of its own, so that only the first is in the fused op."""
    return len(parts.adapters) > 1 and any(adapter.dropout for adapter in parts.adapters)


def _fused_adapters(parts: Parts) -> list[Adapter]:
    return parts.adapters[:1] if has_masks_apart(parts) else parts.adapters


def _projection(parts: Parts) -> Projection:
    """What the fused op computes of a layer."""
    adapters = _fused_adapters(parts)
    first = adapters[0]
    lora_A, lora_B, scaling = first.lora_A, first.lora_B, first.scaling
    if len(adapters) > 1:
        # one update of the sum of the ranks, by the largest factor
        scaling = max(abs(adapter.scaling) for adapter in adapters) or 1.0
        lora_A = torch.cat([adapter.lora_A for adapter in adapters])
        lora_B = torch.cat([a.lora_B * (a.scaling / scaling) for a in adapters], dim=1)
    return Projection(parts.weight, parts.bias, lora_A, lora_B, scaling, first.dropout)


def completed(y: Tensor, x: Tensor, parts: Parts) -> Tensor:
    """The layer's output, given the fused op's."""
    for adapter in _fused_adapters(parts):
        if adapter.bias is not None:
            # added in its own dtype, so that its gradient is summed in it
            y = (y + adapter.scaling * adapter.bias).to(y.dtype)
    # under autocast, too, a quantised layer gives x's dtype back
    return in_dtype(y, x.dtype) if isinstance(parts.weight, FrozenWeight) else y
