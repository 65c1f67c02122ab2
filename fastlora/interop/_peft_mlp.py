"""Gated MLPs whose last layer is a fused LoRA layer of PEFT's: half of what they keep for backward.

An MLP is known by its forward's bytecode, whoever wrote it: down(act(gate(x)) · up(x)) of Llama, Mistral,
Qwen and Gemma, and Phi's, whose gate and up are halves of one projection.
"""

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastlora.interop import _peft_siblings as siblings
from fastlora.interop._peft_fused import Fused
from fastlora.interop._peft_parts import is_called_plainly
from fastlora.reference import Gate


class Form(NamedTuple):
    """Names of a gated MLP's modules.

    Attributes:
        down: The last projection.
        activation: The gate's.
        projections: gate and up, or the one that both are halves of.
    """

    down: str
    activation: str
    projections: tuple[str, ...]


def _separate(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _separate_at_once(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _joint(self: Any, x: Any) -> Any:
    up = self.gate_up_proj(x)

    gate, up = up.chunk(2, dim=-1)
    up = up * self.activation_fn(gate)

    return self.down_proj(up)


def form_of(kind: type[nn.Module]) -> Form | None:
    """The form of a class's forward; None if it is none of these."""
    code = getattr(kind.forward, "__code__", None)
    if code is None:
        return None
    for template in (_separate, _separate_at_once, _joint):
        known = template.__code__
        same = code.co_code == known.co_code and code.co_consts[1:] == known.co_consts[1:]
        if not same or code.co_argcount != known.co_argcount or code.co_freevars:
            continue
        if template is not _joint:
            down, activation, gate, up = code.co_names
            return Form(down, activation, (gate, up))
        both, method, activation, down = code.co_names
        if method == "chunk":
            return Form(down, activation, (both,))
    return None


def gate_of(activation: Any) -> Gate | None:
    """The op's name of an activation; None if it is none that the op knows."""
    kind = type(activation)
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    named = vars(sys.modules.get("transformers.activations", torch))
    if kind in (nn.SiLU, named.get("SiLUActivation")):
        return "silu"
    # both have a slower formula in Python, too
    act: Any = vars(activation).get("act") if isinstance(activation, nn.Module) else None
    if kind is named.get("GELUActivation") and act is F.gelu:
        return "gelu"
    if kind in (named.get("GELUTanh"), named.get("PytorchGELUTanh")):
        tanh = isinstance(act, functools.partial) and act.func is F.gelu
        return "gelu_tanh" if tanh and act.keywords == {"approximate": "tanh"} else None
    return None


class FusedGatedMLP:
    """A gated MLP with everything of it but what its forward keeps for backward.

    The base of classes that :func:`fuse` makes, each with an MLP's own class. A call is fused while every
    module inside is called as it stands there, and its last layer is a fused one with one adapter.
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
        if not isinstance(self, FusedGatedMLP):
            return type(self).forward(self, *args, **kwargs)
        down: Any = self._modules[self._form.down]
        activation = self._modules[self._form.activation]
        known = self._plain.forward is self._own_forward and self._knows(activation)
        plainly = not kwargs and is_called_plainly(activation) and is_called_plainly(down)
        if not (known and plainly and isinstance(down, Fused)):
            return self._plain.forward(self, *args, **kwargs)
        gate, up = self._gate_and_up(*args)
        out = down.forward_gated(gate, up, self._gate)
        return self._modules[self._form.down](activation(gate) * up) if out is None else out

    def _gate_and_up(self, x: Any) -> Any:
        modules = [self._modules[name] for name in self._form.projections]
        if all(isinstance(module, Fused) for module in modules) and len(modules) == 2:
            found = siblings.together(modules, x)
            if found is not None:
                return found
        given = [getattr(self, name)(x) for name in self._form.projections]
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
    return type(f"Fused{plain.__name__}", (FusedGatedMLP, plain), own)


def _restored(plain: Any, gate: Gate, activation: Any) -> Any:
    kind = _fused_class(plain, gate, activation)
    return kind.__new__(kind)


def fuse(module: nn.Module) -> None:
    """Change a module's class, if it is a gated MLP with a known activation whose last layer is fused."""
    kind = type(module)
    form = None if isinstance(module, FusedGatedMLP) else form_of(kind)
    if form is None or "forward" in vars(module):
        return
    names = (form.down, form.activation, *form.projections)
    if not all(name in module._modules for name in names):
        return
    activation = module._modules[form.activation]
    gate = gate_of(activation)
    if gate is not None and isinstance(module._modules[form.down], Fused):
        made: Any = _fused_class
        module.__class__ = made(kind, gate, type(activation))


def unfuse(module: Any) -> None:
    """Give an MLP its own class back, if it lost it."""
    # FSDP's class of one stays: it computes the same
    if FusedGatedMLP in type(module).__bases__:
        module.__class__ = module._plain
