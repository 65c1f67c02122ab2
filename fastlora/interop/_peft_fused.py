"""The forward of PEFT's LoRA layers on the fused op."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from fastlora.interop import _peft_siblings as siblings
from fastlora.interop._peft_compute import dora, gated_lora
from fastlora.interop._peft_parts import PLAIN, Parts, read
from fastlora.ops.runtime import autocast_dtype
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
        parts = None if args or kwargs else self.fused_parts(x)
        if parts is None:
            refuse_changed(self._modules["base_layer"], x)
            peft: Any = super()
            out = peft.forward(x, *args, **kwargs)
            return out
        first = parts.adapters[0]
        if first.magnitude is not None:
            return dora(x, parts, first, first.magnitude)
        return siblings.compute(self, x, parts)

    def forward_gated(self, gate: Tensor, up: Tensor | None, activation: Gate) -> Tensor | None:
        """:meth:`forward` of act(gate)·up, or of act(gate), which is not kept; None where the fused op serves
        no such call.
        """
        plain = up is None or (gate.shape == up.shape and gate.dtype is up.dtype and type(up) in PLAIN)
        parts = self.fused_parts(gate) if plain else None
        if parts is None or len(parts.adapters) > 1 or parts.adapters[0].magnitude is not None:
            return None
        return gated_lora(gate, up, parts, activation)

    def fused_parts(self, x: Tensor) -> Parts | None:
        """What a call is computed from; None if PEFT has to compute it."""
        return None if self.disable_adapters or self.merged_adapters else self._parts(x)

    def _parts(self, x: Tensor) -> Parts | None:
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
