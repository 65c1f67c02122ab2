"""MLPs whose last layer has LoRA: half of what they keep for backward, or less.

Gated ones, down(act(gate(x)) · up(x)), and others, down(act(up(x))), of the forms that
:mod:`fastlora.together.mlp_forms` knows.
"""

from typing import Any

from torch import nn

from fastlora.together import mlp_spread as spread
from fastlora.together import siblings
from fastlora.together.activations import gate_of
from fastlora.together.compute import of_gated
from fastlora.together.fused_class import FusedModule, fused_class
from fastlora.together.mlp_forms import Form, form_of
from fastlora.together.parts import PLAIN, LayerOfParts, can_tell, passes_on


class FusedMLP(FusedModule):
    """An MLP with everything of it but what its forward keeps for backward.

    The base of classes that :func:`fuse` gives, each with an MLP's own class. A call is fused while every
    module inside is called as it stands there, its last layer tells what it is computed from, and dropout
    before that drops nothing.
    """

    # for the type checker
    _names: Form

    @staticmethod
    def _names_in(plain: Any, *kinds: Any) -> Form | None:
        return form_of(plain)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``[..., hidden_size]`` to the same, as the MLP's own."""
        # whoever kept this method before restore() calls it still
        if not isinstance(self, FusedMLP):
            return type(self).forward(self, *args, **kwargs)
        form = self._names
        inside: list[Any] = [self._modules.get(name) for name in (form.activation, form.down, *form.between)]
        activation, down, *between = inside
        known = len(args) == 1 and not kwargs and type(args[0]) in PLAIN and self._is_known(activation)
        if not (known and can_tell(down) and all(map(passes_on, between))):
            return self._own_call(*args, **kwargs)
        gate, up = self._gate_and_up(*args)
        out = of_gated(down, gate, up, self._gate)
        if out is None:
            x = activation(gate) if up is None else activation(gate) * up
            for module in (*between, down):
                x = module(x)
            out = x
        for name in form.after:
            out = getattr(self, name)(out)
        return out

    def _gate_and_up(self, x: Any) -> Any:
        names = self._names.projections
        modules = [self._modules.get(name) for name in names]
        if len(modules) == 2 and all(isinstance(module, LayerOfParts) for module in modules):
            found = siblings.together(modules, x)
            if found is not None:
                return found
        given = [getattr(self, name)(x) for name in names]
        if not self._names.is_gated:
            return given[0], None
        return given if len(given) == 2 else given[0].chunk(2, dim=-1)


def fuse(module: nn.Module) -> None:
    """Change a module's class, if it is an MLP, or a layer with one spread over its modules, with a known
    activation and a last layer with LoRA.
    """
    spread.fuse(module)
    kind: Any = type(module)
    form = None if isinstance(module, FusedMLP) else form_of(kind)
    if form is None or "forward" in vars(module):
        return
    activation, down = (module._modules.get(name) for name in (form.activation, form.down))
    gate = gate_of(activation)
    if gate is not None and isinstance(down, LayerOfParts):
        module.__class__ = fused_class(FusedMLP, form, gate, kind, type(activation))


def unfuse(module: Any) -> None:
    """Give an MLP, or a layer with one, its own class back, if it lost it."""
    # FSDP's class of one stays: it computes the same
    if {FusedMLP, spread.FusedLayer} & set(type(module).__bases__):
        module.__class__ = module._plain
