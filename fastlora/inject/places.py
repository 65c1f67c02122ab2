"""The place of one bottleneck adapter in a model: what it is made from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import nn

from fastlora.nn import AdaptedModule, AdapterLayer
from fastlora.nn.adapted import AdapterPlacement
from fastlora.nn.settings import AdapterSettings

# beside a dropout and a fixed scale, with which any adapter works
_DECISIVE = ("adapter_size", "activation", "layer_norm", "bias")


@dataclass(frozen=True)
class Place:
    """One adapter, made or to be made.

    Attributes:
        placement: How it works with its module, see :class:`AdaptedModule`.
        hidden_size: Width of what it adapts.
        settings: Bottleneck, activation, norm, scale, dropout and biases of the adapter.
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
        return first_difference(self._decisive(), other._decisive())

    def make(self, device: torch.device, dtype: torch.dtype) -> AdapterLayer:
        """A fresh adapter for this place."""
        return AdapterLayer(self.hidden_size, **asdict(self.settings), device=device, dtype=dtype)

    def _decisive(self) -> dict[str, object]:
        settings = {name: getattr(self.settings, name) for name in _DECISIVE}
        scale = "learned" if self.settings.scale == "learned" else "fixed"
        return {"placement": self.placement, "hidden_size": self.hidden_size, **settings, "scale": scale}


def first_difference(here: Mapping[str, object], given: Mapping[str, object]) -> str | None:
    """Where what a model has and what is given for it differ first, in words; None if nowhere."""
    for name, value in here.items():
        if value != given[name]:
            return f"expected {name} {value!r} as in the model, got {given[name]!r}"
    return None
