"""The place of one bottleneck adapter in a model: what it is made from."""

from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import nn

from fastlora.nn import AdaptedModule, AdapterLayer
from fastlora.nn.adapted import AdapterPlacement
from fastlora.nn.settings import AdapterSettings

_DECISIVE = ("placement", "hidden_size", "adapter_size", "activation", "layer_norm", "bias", "scale")


@dataclass(frozen=True)
class Place:
    """One adapter, made or to be made.

    Attributes:
        placement: How it works with its module, see :class:`AdaptedModule`.
        hidden_size: Width of what it adapts.
        settings: Its bottleneck, activation, norm, scale, dropout and biases.
    """

    placement: AdapterPlacement
    hidden_size: int
    settings: AdapterSettings

    @classmethod
    def of(cls, module: AdaptedModule) -> Self:
        """What an adapter in a model was made from."""
        layer = module.adapter
        settings = AdapterSettings(
            adapter_size=layer.adapter_size,
            activation=layer.activation,
            layer_norm=layer.layer_norm,
            scale="learned" if isinstance(layer.scale, nn.Parameter) else layer.scale,
            dropout=layer.dropout,
            bias=layer.down_proj.bias is not None,
        )
        return cls(module.placement, layer.hidden_size, settings)

    def difference(self, other: "Place") -> str | None:
        """What keeps an adapter made for ``other`` from working here; dropout and a fixed scale do not."""
        for name, mine, theirs in zip(_DECISIVE, self._decisive(), other._decisive(), strict=True):
            if mine != theirs:
                return f"expected {name} {mine!r} as in the model, got {theirs!r}"
        return None

    def make(self, device: torch.device, dtype: torch.dtype) -> AdapterLayer:
        """A fresh adapter for this place."""
        return AdapterLayer(self.hidden_size, **asdict(self.settings), device=device, dtype=dtype)

    def _decisive(self) -> tuple[object, ...]:
        learned = "learned" if self.settings.scale == "learned" else "fixed"
        settings = (getattr(self.settings, name) for name in _DECISIVE[2:-1])
        return (self.placement, self.hidden_size, *settings, learned)
