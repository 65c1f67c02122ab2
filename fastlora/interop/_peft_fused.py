"""The forward of PEFT's LoRA layers on the fused op."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.functional import dora_linear, dora_weight_norm
from fastlora.interop._peft_parts import read
from fastlora.ops.runtime import autocast_dtype
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.repacking import refuse_changed
from fastlora.together import siblings
from fastlora.together.parts import Adapter, LayerOfParts, Parts, has_global_hooks, is_plain_input


class Fused(LayerOfParts):
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
        parts = None if args or kwargs else self._parts_of(x)
        if parts is None:
            refuse_changed(self._modules["base_layer"], x)
            peft: Any = super()
            out = peft.forward(x, *args, **kwargs)
            return out
        first = parts.adapters[0]
        if first.magnitude is not None:
            return _dora(x, parts, first, first.magnitude)
        return siblings.compute(self, x, parts)

    def _parts_of(self, x: Tensor) -> Parts | None:
        return None if self.disable_adapters or self.merged_adapters else self._parts(x)

    def _draws_masks(self) -> bool:
        return any(
            type(dropout) is nn.Dropout and dropout.training and dropout.p
            for dropout in self._modules["lora_dropout"]._modules.values()
        )

    def _parts(self, x: Tensor) -> Parts | None:
        adapters = self._modules["lora_A"]._modules
        names = [name for name in self.active_adapters if name in adapters]
        if not (names and is_plain_input(x)) or has_global_hooks():
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
