"""The forward of PEFT's LoRA layers on the fused op."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from fastlora.functional import dora_linear, dora_weight_norm, gated_lora_linear, lora_linear
from fastlora.interop._peft_parts import PLAIN, Adapter, Parts, read
from fastlora.ops.runtime import autocast_dtype, in_dtype
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.repacking import refuse_changed
from fastlora.reference import Gate

# torch fills these dicts in place
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class Fused:
    """A LoRA layer of PEFT's, with everything of it but the way the forward is computed.

    An instance of PEFT's class whose class was changed to one of both: parameters, adapters, state dict and
    every method but :meth:`forward` are PEFT's. The modules inside are read, not called, so a call is fused
    only while each of them is what PEFT and the quantiser put there. Else, and where the fused op serves
    nothing (adapters merged or switched off, ``adapter_names``, tensor subclasses, DoRA beside another
    adapter or a quantised weight), the call is PEFT's.
    """

    # for the type checker
    _modules: dict[str, Any]
    active_adapters: list[str]
    disable_adapters: bool
    merged_adapters: list[str]
    cast_input_dtype_enabled: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, as PEFT's."""
        # whoever kept this method before restore() calls it still
        if not isinstance(self, Fused):
            out: Tensor = type(self).forward(self, x, *args, **kwargs)
            return out
        plain = not (args or kwargs or self.disable_adapters or self.merged_adapters)
        parts = self._parts(x) if plain else None
        if parts is None:
            refuse_changed(self._modules["base_layer"], x)
            peft: Any = super()
            out = peft.forward(x, *args, **kwargs)
            return out
        first = parts.adapters[0]
        if first.magnitude is not None:
            return _dora(x, parts, first, first.magnitude)
        y = _lora(x, parts)
        # under autocast, too, a quantised layer gives x's dtype back
        return in_dtype(y, x.dtype) if isinstance(parts.weight, FrozenWeight) else y

    def forward_gated(self, gate: Tensor, up: Tensor, activation: Gate) -> Tensor | None:
        """:meth:`forward` of act(gate)·up, which is not kept; None where the fused op serves no such call."""
        plain = gate.shape == up.shape and gate.dtype is up.dtype and type(up) in PLAIN
        parts = self._parts(gate) if plain and not (self.disable_adapters or self.merged_adapters) else None
        if parts is None or len(parts.adapters) > 1 or parts.adapters[0].magnitude is not None:
            return None
        (adapter,) = parts.adapters
        layer = (parts.weight, parts.bias, adapter.lora_A, adapter.lora_B)
        options: dict[str, Any] = {"scaling": adapter.scaling, "dropout": adapter.dropout}
        y = gated_lora_linear(gate, up, *layer, activation=activation, **options)
        y = _with_bias(y, adapter)
        return in_dtype(y, gate.dtype) if isinstance(parts.weight, FrozenWeight) else y

    def _parts(self, x: Tensor) -> Parts | None:
        """What a call is computed from; None if PEFT has to compute it."""
        adapters = self._modules["lora_A"]._modules
        names = [name for name in self.active_adapters if name in adapters]
        if not names or type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested:
            return None
        if any(_GLOBAL_HOOKS):
            return None
        base = self._modules["base_layer"]
        if not base.__dict__.get("compute_type_is_set", True):
            # as bitsandbytes' layer when it is called first
            base.set_compute_type(x)
            base.compute_type_is_set = True
        parts = read(self, names)
        if isinstance(parts, str) or not self._fits(x, parts):
            return None
        # of a vector, PEFT's DoRA makes a row
        dora = any(adapter.magnitude is not None for adapter in parts.adapters)
        return None if dora and (len(names) > 1 or x.dim() < 2) else parts

    def _fits(self, x: Tensor, parts: Parts) -> bool:
        """Whether PEFT's own products take these dtypes."""
        if isinstance(parts.weight, FrozenWeight):
            return self._fits_quantised(x, parts, parts.weight.compute_dtype or x.dtype)
        if x.dtype is parts.weight.dtype and self.cast_input_dtype_enabled:
            return True
        if autocast_dtype(x) is not None:
            return parts.weight.dtype != torch.float64
        return x.dtype is parts.weight.dtype and all(a.lora_A.dtype is x.dtype for a in parts.adapters)

    def _fits_quantised(self, x: Tensor, parts: Parts, dtype: torch.dtype) -> bool:
        """Whether the base layer, which computes in this dtype, and PEFT's LoRA beside it do so in one."""
        autocast = autocast_dtype(x)
        if autocast is not None:
            # the layer casts x itself, whatever autocast says
            return dtype is autocast
        if x.dtype is not dtype or not (parts.bias is None or parts.bias.dtype is dtype):
            return False
        return self.cast_input_dtype_enabled or all(a.lora_A.dtype is dtype for a in parts.adapters)


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
        y = _with_bias(y, adapter)
    return y


def _with_bias(y: Tensor, adapter: Adapter) -> Tensor:
    if adapter.bias is None:
        return y
    # added in its own dtype, so that its gradient is summed in it
    return (y + adapter.scaling * adapter.bias).to(y.dtype)


def _dora(x: Tensor, parts: Parts, adapter: Adapter, magnitude: Tensor) -> Tensor:
    """m / ‖W + s·B·A‖ ⊙ (W·x + s·B·A·x) + bias (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    With dropout the published code and PEFT let W see the dropped x in the first product and the whole x
    beside it: W·x + (m / ‖…‖ - 1) ⊙ W·dropped.
    """
    weight, bias, scaling = parts.weight, parts.bias, adapter.scaling
    assert not isinstance(weight, FrozenWeight)
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
