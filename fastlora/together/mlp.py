"""MLPs whose last layer has LoRA: half of what they keep for backward, or less.

Gated ones, down(act(gate(x)) · up(x)), and others, down(act(up(x))), of the forms that
:mod:`fastlora.together.mlp_forms` knows.
"""

import functools
from typing import Any

from torch import nn

from fastlora.reference import Gate
from fastlora.together import mlp_spread as spread
from fastlora.together import siblings
from fastlora.together.compute import of_gated
from fastlora.together.mlp_forms import Form, form_of, gate_of
from fastlora.together.parts import LayerOfParts, is_called_plainly, passes_on


class FusedMLP:
    """An MLP with everything of it but what its forward keeps for backward.

    The base of classes that :func:`fuse` makes, each with an MLP's own class. A call is fused while every
    module inside is called as it stands there, its last layer tells what it is computed from, and dropout
    before that drops nothing.
    """

    # for the type checker
    _modules: dict[str, Any]
    _plain: type[nn.Module]
    _own_forward: Any
    _form: Form
    _gate: Gate
    _activation: Any
    _activation_forward: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``[..., hidden_size]`` to the same, as the MLP's own."""
        # whoever kept this method before restore() calls it still
        if not isinstance(self, FusedMLP):
            return type(self).forward(self, *args, **kwargs)
        down: Any = self._modules[self._form.down]
        activation = self._modules[self._form.activation]
        known = self._plain.forward is self._own_forward and self._knows(activation)
        plainly = not kwargs and is_called_plainly(activation) and is_called_plainly(down)
        between = [self._modules[name] for name in self._form.between]
        if not (known and plainly and isinstance(down, LayerOfParts) and all(map(passes_on, between))):
            return self._plain.forward(self, *args, **kwargs)
        gate, up = self._gate_and_up(*args)
        out = of_gated(down, gate, up, self._gate)
        if out is None:
            x = activation(gate) if up is None else activation(gate) * up
            for module in (*between, down):
                x = module(x)
            out = x
        for name in self._form.after:
            out = self._modules[name](out)
        return out

    def _gate_and_up(self, x: Any) -> Any:
        modules = [self._modules[name] for name in self._form.projections]
        if all(isinstance(module, LayerOfParts) for module in modules) and len(modules) == 2:
            found = siblings.together(modules, x)
            if found is not None:
                return found
        given = [getattr(self, name)(x) for name in self._form.projections]
        if not self._form.is_gated:
            return given[0], None
        return given if len(given) == 2 else given[0].chunk(2, dim=-1)

    def _knows(self, activation: Any) -> bool:
        """Whether the activation is still what it was."""
        kind = type(activation)
        unpatched = kind is self._activation and kind.forward is self._activation_forward
        return unpatched and (kind is not nn.GELU or gate_of(activation) == self._gate)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the MLP's own class, because this one stands in no module."""
        return _restored, (self._plain, self._gate, self._activation), self.__dict__


@functools.cache
def _fused_class(plain: Any, gate: Gate, activation: Any) -> Any:
    own = {"_plain": plain, "_own_forward": staticmethod(plain.forward), "_form": form_of(plain)}
    own |= {"_gate": gate, "_activation": activation, "__module__": __name__}
    own["_activation_forward"] = staticmethod(activation.forward)
    return type(f"Fused{plain.__name__}", (FusedMLP, plain), own)


def _restored(plain: Any, gate: Gate, activation: Any) -> Any:
    kind = _fused_class(plain, gate, activation)
    return kind.__new__(kind)


def fuse(module: nn.Module) -> None:
    """Change a module's class, if it is an MLP, or a layer with one spread over its modules, with a known
    activation and a last layer with LoRA.
    """
    spread.fuse(module)
    kind = type(module)
    form = None if isinstance(module, FusedMLP) else form_of(kind)
    if form is None or "forward" in vars(module):
        return
    names = (form.down, form.activation, *form.projections, *form.between, *form.after)
    if not all(name in module._modules for name in names):
        return
    activation = module._modules[form.activation]
    gate = gate_of(activation)
    if gate is not None and isinstance(module._modules[form.down], LayerOfParts):
        made: Any = _fused_class
        module.__class__ = made(kind, gate, type(activation))


def unfuse(module: Any) -> None:
    """Give an MLP, or a layer with one, its own class back, if it lost it."""
    # FSDP's class of one stays: it computes the same
    if {FusedMLP, spread.FusedLayer} & set(type(module).__bases__):
        module.__class__ = module._plain
