"""PEFT's LoRA linear layer with the fused op in its forward."""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.functional import dora_linear, dora_weight_norm, lora_linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedLinear(Linear):
    """PEFT's ``lora.Linear``, with everything of it but the way the forward is computed.

    An instance of PEFT's class whose class was changed: parameters, adapters, state dict and every method but
    :meth:`forward` are PEFT's. A call that the fused op doesn't serve (adapters merged or switched off,
    ``adapter_names``, hooks on the layers inside, DoRA beside another adapter) is PEFT's as well.
    """

    # PEFT's own attributes, for the type checker
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, as PEFT's."""
        names = () if args or kwargs or self.disable_adapters or self.merged else self._active_names()
        if not names or not self._is_served(x, names):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        if names[0] in self.lora_variant:
            return self._dora(x, names[0])
        return self._lora(x, names)

    def _active_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.active_adapters if name in self.lora_A)

    def _is_served(self, x: Tensor, names: tuple[str, ...]) -> bool:
        parts = [self.base_layer, *(m for name in names for m in (self.lora_A[name], self.lora_B[name]))]
        if not all(_is_plain(part) for part in parts):
            return False
        if x.dtype != self.base_layer.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return False
        # an adapter that was added later may be of any variant
        return not _exotic(self) and (len(names) == 1 or not any(name in self.lora_variant for name in names))

    def _dropout(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _lora(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        base, first = self.base_layer, names[0]
        # a mask of its own for every adapter
        apart = [name for name in names[1:] if any(map(self._dropout, names))]
        together = [name for name in names if name not in apart]
        lora_A, lora_B = self.lora_A[first].weight, self.lora_B[first].weight
        if len(together) > 1:
            # one update of the sum of the ranks
            lora_A = torch.cat([self.lora_A[name].weight for name in together])
            relative = [self.scaling[name] / self.scaling[first] for name in together]
            lora_B = torch.cat(
                [self.lora_B[name].weight * r for name, r in zip(together, relative, strict=True)], dim=1
            )
        y = lora_linear(
            x,
            base.weight,
            base.bias,
            lora_A,
            lora_B,
            scaling=self.scaling[first],
            dropout=self._dropout(first),
        )
        for name in apart:
            update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
            y = (y + self.scaling[name] * update).to(y.dtype)
        for name in together:
            bias = self.lora_B[name].bias
            if bias is not None:
                # added in its own dtype, so that its gradient is summed in it
                y = (y + self.scaling[name] * bias).to(y.dtype)
        return y

    def _dora(self, x: Tensor, name: str) -> Tensor:
        """m / ‖W + s·B·A‖ ⊙ (W·x + s·B·A·x) + bias (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

        With dropout the published code and PEFT let W see the dropped x in the first product and the whole x
        beside it: W·x + (m / ‖…‖ - 1) ⊙ W·dropped.
        """
        base, scaling = self.base_layer, self.scaling[name]
        dropped = self.lora_dropout[name](x) if self._dropout(name) else x
        lora_A, lora_B = self.lora_A[name], self.lora_B[name]
        magnitude = self.lora_magnitude_vector[name].weight
        norm = dora_weight_norm(base.weight, lora_A.weight, lora_B.weight, scaling)
        y = dora_linear(
            dropped,
            base.weight,
            None if dropped is not x else base.bias,
            lora_A.weight,
            lora_B.weight,
            magnitude,
            scaling=scaling,
            weight_norm=norm,
        )
        if dropped is not x:
            y = y + F.linear(x - dropped, base.weight, base.bias)
        if lora_B.bias is not None:
            y = (y + scaling * lora_B.bias * (magnitude / norm)).to(y.dtype)
        return y


def why_not(layer: PeftLayer) -> str | None:
    """Why a PEFT layer is left as it is; None if the fused op serves it."""
    if not isinstance(layer, Linear) or type(layer) not in (Linear, FusedLinear):
        return f"lora.{type(layer).__name__}"
    if type(layer.base_layer) is not nn.Linear:
        return f"lora.Linear on {type(layer.base_layer).__name__}"
    if layer.fan_in_fan_out:
        return "lora.Linear with fan_in_fan_out"
    exotic = _exotic(layer)
    return f"lora.Linear with {', '.join(exotic)}" if exotic else None


def _exotic(layer: PeftLayer) -> list[str]:
    """Names of the variants of a layer's adapters that only PEFT computes."""
    variants = {v if isinstance(v, type) else type(v) for v in layer.lora_variant.values()}
    return sorted(v.__name__ for v in variants if v is not DoraLinearVariant)


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing would notice that its own forward is not called."""
    own = vars(module)
    return type(module) is nn.Linear and "forward" not in own and not any(own[hooks] for hooks in _HOOKS)
