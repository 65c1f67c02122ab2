"""BERT's MLP, which is spread over two modules that its layer calls, with LoRA in its last projection."""

import functools
from typing import Any

from torch import nn

from fastlora.reference import Gate
from fastlora.together.compute import of_gated
from fastlora.together.mlp_forms import Spread, gate_of, spread_of
from fastlora.together.parts import LayerOfParts, is_called_plainly


class FusedLayer:
    """A layer with everything of it but what its MLP keeps for backward.

    The base of classes that :func:`fuse` makes, each with a layer's own class and its name, by which policies
    of sharding look for layers. A call is fused while every module inside is called as it stands there, and
    the MLP's last projection tells what it is computed from.
    """

    # for the type checker
    _modules: dict[str, Any]
    _plain: Any
    _chunk: Any
    _names: Spread
    _gate: Gate
    _forwards: dict[Any, Any]

    # transformers counts its arguments
    def feed_forward_chunk(self, x: Any) -> Any:
        """``[..., hidden_size]`` to the same, as the layer's own."""
        # whoever kept this method before restore() calls it still
        if not isinstance(self, FusedLayer):
            return type(self).feed_forward_chunk(self, x)
        names = self._names
        first, last = self._modules[names.first], self._modules[names.last]
        activation, down = first._modules[names.activation], last._modules[names.down]
        plainly = all(map(is_called_plainly, (first, activation, last, down)))
        if not (plainly and isinstance(down, LayerOfParts) and self._knows(first, activation, last)):
            return self._plain.feed_forward_chunk(self, x)
        gate = first._modules[names.projection](x)
        out = of_gated(down, gate, None, self._gate)
        if out is None:
            return last(activation(gate), x)
        return last._modules[names.norm](last._modules[names.dropout](out) + x)

    def _knows(self, first: Any, activation: Any, last: Any) -> bool:
        """Whether the layer and these modules still compute what they did."""
        kinds = [type(module) for module in (first, activation, last)]
        unpatched = all(kind in self._forwards and kind.forward is self._forwards[kind] for kind in kinds)
        known = unpatched and self._plain.feed_forward_chunk is self._chunk
        return known and (type(activation) is not nn.GELU or gate_of(activation) == self._gate)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the layer's own class, because this one stands in no module."""
        return _restored, (self._plain, self._names, self._gate, *self._forwards), self.__dict__


@functools.cache
def _fused_class(plain: Any, names: Spread, gate: Gate, *kinds: Any) -> Any:
    own = {"_plain": plain, "_chunk": staticmethod(plain.feed_forward_chunk), "_names": names, "_gate": gate}
    own |= {"_forwards": {kind: kind.forward for kind in kinds}, "__module__": __name__}
    return type(plain.__name__, (FusedLayer, plain), own)


def _restored(*made_of: Any) -> Any:
    kind = _fused_class(*made_of)
    return kind.__new__(kind)


def fuse(layer: nn.Module) -> None:
    """Change a layer's class, if it is one as BERT's with a known activation and LoRA in its last layer."""
    names = None if isinstance(layer, FusedLayer) else spread_of(layer)
    if names is None or "feed_forward_chunk" in vars(layer):
        return
    modules: Any = layer._modules
    first, last = modules[names.first], modules[names.last]
    activation = first._modules.get(names.activation)
    gate = gate_of(activation)
    if gate is not None and isinstance(last._modules.get(names.down), LayerOfParts):
        made: Any = _fused_class
        layer.__class__ = made(type(layer), names, gate, type(first), type(activation), type(last))
