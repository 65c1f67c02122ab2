"""BERT's MLP, which is spread over two modules that its layer calls, with LoRA in its last projection."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastlora.together.activations import gate_of
from fastlora.together.compute import of_gated
from fastlora.together.fused_class import FusedModule, fused_class
from fastlora.together.mlp_forms import Spread, spread_of, spread_of_kinds
from fastlora.together.parts import LayerOfParts, can_tell


class FusedLayer(FusedModule):
    """A layer with everything of it but what its MLP keeps for backward.

    The base of classes that :func:`fuse` gives, each with a layer's own class and its name, by which policies
    of sharding look for layers. A call is fused while every module inside is called as it stands there, and
    the MLP's last projection tells what it is computed from.
    """

    _method = "feed_forward_chunk"
    _title = "{}"

    # for the type checker
    _names: Spread

    @staticmethod
    def _names_in(plain: Any, *kinds: Any) -> Spread | None:
        _, first, last = kinds
        return spread_of_kinds(plain, first, last)

    # transformers counts its arguments
    def feed_forward_chunk(self, x: Any) -> Any:
        """``[..., hidden_size]`` to the same, as the layer's own."""
        # whoever kept this method before restore() calls it still
        if not isinstance(self, FusedLayer):
            return type(self).feed_forward_chunk(self, x)
        names = self._names
        first: Any = self._modules.get(names.first)
        last: Any = self._modules.get(names.last)
        activation, down = _inside(first, names.activation), _inside(last, names.down)
        if not (can_tell(down) and self._is_known(activation, first, last)):
            return self._own_call(x)
        gate = getattr(first, names.projection)(x)
        out = of_gated(down, gate, None, self._gate)
        if out is None:
            return last(activation(gate), x)
        return getattr(last, names.norm)(getattr(last, names.dropout)(out) + x)


def _inside(module: Any, name: str) -> Any:
    return None if module is None else module._modules.get(name)


def fuse(layer: nn.Module) -> None:
    """Change a layer's class, if it is one as BERT's with a known activation and LoRA in its last layer."""
    names = None if isinstance(layer, FusedLayer) else spread_of(layer)
    if names is None or "feed_forward_chunk" in vars(layer):
        return
    first, last = layer._modules[names.first], layer._modules[names.last]
    activation, down = _inside(first, names.activation), _inside(last, names.down)
    gate = gate_of(activation)
    if gate is not None and isinstance(down, LayerOfParts):
        kinds: Any = type(layer), type(activation), type(first), type(last)
        layer.__class__ = fused_class(FusedLayer, names, gate, *kinds)


def give_all(modules: Iterable[Any]) -> None:
    """Give the class that one layer got to all of its own class: by its name, one of them is looked for."""
    modules = list(modules)
    kinds: Any = {type(each)._plain: type(each) for each in modules if FusedLayer in type(each).__bases__}
    for module in modules:
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
