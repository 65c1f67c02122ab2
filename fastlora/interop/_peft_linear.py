"""PEFT's LoRA linear layer with the fused op in its forward."""

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from fastlora.functional import dora_linear, dora_weight_norm, lora_linear
from fastlora.interop._peft_parts import PLAIN, Adapter, Parts, read
from fastlora.ops.runtime import autocast_dtype

# torch fills these dicts in place
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class FusedLinear(Linear):
    """PEFT's ``lora.Linear``, with everything of it but the way the forward is computed.

    An instance of PEFT's class whose class was changed: parameters, adapters, state dict and every method but
    :meth:`forward` are PEFT's. The modules inside are read, not called, so a call is fused only while each of
    them is what PEFT put there. Else, and where the fused op serves nothing (adapters merged or switched off,
    ``adapter_names``, tensor subclasses, DoRA beside another adapter), the call is PEFT's.
    """

    # for the type checker
    _modules: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, as PEFT's."""
        # whoever kept this method before restore() calls it still
        fused = isinstance(self, FusedLinear) and not (args or kwargs)
        parts = self._parts(x) if fused and not (self.disable_adapters or self.merged_adapters) else None
        if parts is None:
            out: Tensor = Linear.forward(self, x, *args, **kwargs)
            return out
        first = parts.adapters[0]
        if first.magnitude is not None:
            return _dora(x, parts, first, first.magnitude)
        return _lora(x, parts)

    def _parts(self, x: Tensor) -> Parts | None:
        """What a call is computed from; None if PEFT has to compute it."""
        adapters = self._modules["lora_A"]._modules
        names = [name for name in self.active_adapters if name in adapters]
        if not names or type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested:
            return None
        if any(_GLOBAL_HOOKS):
            return None
        parts = read(self, names)
        if isinstance(parts, str) or not self._fits(x, parts):
            return None
        # of a vector, PEFT's DoRA makes a row
        dora = any(adapter.magnitude is not None for adapter in parts.adapters)
        return None if dora and (len(names) > 1 or x.dim() < 2) else parts

    def _fits(self, x: Tensor, parts: Parts) -> bool:
        """Whether PEFT's own products take these dtypes."""
        if x.dtype is parts.weight.dtype and self.cast_input_dtype_enabled:
            return True
        if autocast_dtype(x) is not None:
            return parts.weight.dtype != torch.float64
        return x.dtype is parts.weight.dtype and all(a.lora_A.dtype is x.dtype for a in parts.adapters)


def _lora(x: Tensor, parts: Parts) -> Tensor:
    shared, apart = parts.adapters, parts.adapters[:0]
    if any(adapter.dropout for adapter in shared):
        # a mask of its own for every adapter
        shared, apart = shared[:1], shared[1:]
    first = shared[0]
    lora_A, lora_B, scaling = first.lora_A, first.lora_B, first.scaling
    if len(shared) > 1:
        # one update of the sum of the ranks, by the largest factor
        scaling = max(abs(adapter.scaling) for adapter in shared) or 1.0
        lora_A = torch.cat([adapter.lora_A for adapter in shared])
        lora_B = torch.cat([a.lora_B * (a.scaling / scaling) for a in shared], dim=1)
    y = lora_linear(x, parts.weight, parts.bias, lora_A, lora_B, scaling=scaling, dropout=first.dropout)
    for adapter in apart:
        dropped = F.dropout(x.to(adapter.lora_A.dtype), adapter.dropout)
        update = F.linear(F.linear(dropped, adapter.lora_A), adapter.lora_B, adapter.bias)
        y = (y + adapter.scaling * update).to(y.dtype)
    for adapter in shared:
        if adapter.bias is not None:
            # added in its own dtype, so that its gradient is summed in it
            y = (y + adapter.scaling * adapter.bias).to(y.dtype)
    return y


def _dora(x: Tensor, parts: Parts, adapter: Adapter, magnitude: Tensor) -> Tensor:
    """m / ‖W + s·B·A‖ ⊙ (W·x + s·B·A·x) + bias (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    With dropout the published code and PEFT let W see the dropped x in the first product and the whole x
    beside it: W·x + (m / ‖…‖ - 1) ⊙ W·dropped.
    """
    weight, bias, scaling = parts.weight, parts.bias, adapter.scaling
    dropped = F.dropout(x, adapter.dropout) if adapter.dropout else x
    y = dora_linear(
        dropped,
        weight,
        None if adapter.dropout else bias,
        adapter.lora_A,
        adapter.lora_B,
        magnitude,
        scaling=scaling,
        weight_norm=dora_weight_norm(weight, adapter.lora_A, adapter.lora_B, scaling),
    )
    return y + F.linear(x - dropped, weight, bias) if adapter.dropout else y


def why_not(layer: PeftLayer) -> str | None:
    """Why a PEFT layer is left as it is; None if the fused op serves it."""
    if not (type(layer) is Linear or isinstance(layer, FusedLinear)):
        return f"lora.{type(layer).__name__}"
    if type(layer.base_layer) is not nn.Linear:
        return f"lora.Linear on {type(layer.base_layer).__name__}"
    if layer.fan_in_fan_out:
        return "lora.Linear with fan_in_fan_out"
    if "forward" in vars(layer):
        return "lora.Linear with a forward of its own"
    # sharded weights are whole again when the layer is called
    found = read(layer, layer.lora_A.keys(), accepted={*PLAIN, DTensor})
    return f"lora.Linear with {found}" if isinstance(found, str) else None


def unfuse(layer: PeftLayer) -> None:
    """Give a layer PEFT's class back, if it lost it."""
    if isinstance(layer, FusedLinear):
        layer.__class__ = _without_fused(type(layer))


@functools.cache
def _without_fused(kind: type) -> Any:
    """A class with PEFT's for FusedLinear: FSDP and parametrizations make subclasses of what they find."""
    if kind is FusedLinear or not issubclass(kind, FusedLinear):
        return Linear if kind is FusedLinear else kind
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(_without_fused(base) for base in kind.__bases__)
    metaclass: Any = type(kind)
    return metaclass(kind.__name__.replace(FusedLinear.__name__, Linear.__name__), bases, own)
