"""How the forward of an MLP is known, whoever wrote it: by its bytecode."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Form(NamedTuple):
    """Names of an MLP's modules.

    Attributes:
        down: The last projection.
        activation: The gate's; in an MLP without one, what stands between the projections.
        projections: gate and up, or the one that both are halves of, or what the activation is applied to.
        is_gated: Whether the activation is multiplied with up.
        between: What is called between the activation and ``down``.
        after: What is called after ``down``.
    """

    down: str
    activation: str
    projections: tuple[str, ...]
    is_gated: bool = True
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


# Llama's, Mistral's, Qwen's, Gemma's
def _separate(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _separate_at_once(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


# Phi-3's
def _joint(self: Any, x: Any) -> Any:
    up = self.gate_up_proj(x)

    gate, up = up.chunk(2, dim=-1)
    up = up * self.activation_fn(gate)

    return self.down_proj(up)


# ViT's, CLIP's, Phi's, GPT-NeoX's
def _in_turn(self: Any, x: Any) -> Any:
    x = self.fc1(x)
    x = self.act(x)
    x = self.fc2(x)
    return x


# Nemotron's, DINOv3's
def _at_once(self: Any, x: Any) -> Any:
    return self.fc2(self.act(self.fc1(x)))


# GPT-J's
def _with_dropout(self: Any, x: Any) -> Any:
    x = self.fc1(x)
    x = self.act(x)
    x = self.fc2(x)
    x = self.drop2(x)
    return x


# wav2vec 2.0's
def _with_dropouts(self: Any, x: Any) -> Any:
    x = self.fc1(x)
    x = self.act(x)
    x = self.drop1(x)
    x = self.fc2(x)
    x = self.drop2(x)
    return x


# timm's
def _with_norm(self: Any, x: Any) -> Any:
    x = self.fc1(x)
    x = self.act(x)
    x = self.drop1(x)
    x = self.norm(x)
    x = self.fc2(x)
    x = self.drop2(x)
    return x


_GATED = Form("down_proj", "act_fn", ("gate_proj", "up_proj"))
_PLAIN = Form("fc2", "act", ("fc1",), is_gated=False)
_FORMS: dict[Callable[..., Any], Form] = {
    _separate: _GATED,
    _separate_at_once: _GATED,
    _joint: Form("down_proj", "activation_fn", ("gate_up_proj",)),
    _in_turn: _PLAIN,
    _at_once: _PLAIN,
    _with_dropout: _PLAIN._replace(after=("drop2",)),
    _with_dropouts: _PLAIN._replace(between=("drop1",), after=("drop2",)),
    _with_norm: _PLAIN._replace(between=("drop1", "norm"), after=("drop2",)),
}


class Spread(NamedTuple):
    """Names of what BERT's layer calls for its MLP, which is spread over two modules.

    Attributes:
        first: The module of projection and activation.
        projection: In ``first``.
        activation: In ``first``.
        last: The module of last projection, dropout and norm of the sum with the layer's input.
        down: In ``last``.
        dropout: In ``last``.
        norm: In ``last``.
    """

    first: str
    projection: str
    activation: str
    last: str
    down: str
    dropout: str
    norm: str


def _chunk(self: Any, x: Any) -> Any:
    inner = self.first(x)
    out = self.last(inner, x)
    return out


def _first(self: Any, x: Any) -> Any:
    x = self.projection(x)
    x = self.activation(x)
    return x


def _last(self: Any, x: Any, given: Any) -> Any:
    x = self.down(x)
    x = self.dropout(x)
    x = self.norm(x + given)
    return x


def spread_of(layer: nn.Module) -> Spread | None:
    """The names of a layer as BERT's; None if it is none."""
    chunk = names_like(_chunk, getattr(type(layer), "feed_forward_chunk", None))
    if chunk is None:
        return None
    first, last = (layer._modules.get(chunk[name]) for name in ("first", "last"))
    return spread_of_kinds(type(layer), type(first), type(last))


def spread_of_kinds(layer: Any, first: Any, last: Any) -> Spread | None:
    """The names of a layer as BERT's, given the classes of it and of its two modules; None if it is none."""
    called = (layer, "feed_forward_chunk"), (first, "forward"), (last, "forward")
    found = [
        names_like(template, getattr(kind, method, None))
        for template, (kind, method) in zip((_chunk, _first, _last), called, strict=True)
    ]
    return (
        None
        if None in found
        else Spread(**{role: name for each in found for role, name in (each or {}).items()})
    )


def form_of(kind: type[nn.Module]) -> Form | None:
    """The form of a class's forward; None if it is none of these."""
    for template, form in _FORMS.items():
        names = names_like(template, kind.forward)
        # a tensor's method is none of the module's
        if names is not None and names.get("chunk", "chunk") == "chunk":
            return _renamed(form, names)
    return None


def names_like(template: Any, function: Any) -> dict[str, str] | None:
    """A function's attribute for each that a template names; None if it does anything else."""
    code, known = getattr(function, "__code__", None), template.__code__
    if code is None or code.co_code != known.co_code or _constants(code) != _constants(known):
        return None
    if _arguments(code) != _arguments(known) or len(code.co_names) != len(known.co_names):
        return None
    return dict(zip(known.co_names, code.co_names, strict=True))


def _constants(code: Any) -> Any:
    # up to Python 3.12 None stands in place of a docstring that there is not
    has_docstring = isinstance(code.co_consts[0], str | None) if code.co_consts else False
    return code.co_consts[has_docstring:]


def _arguments(code: Any) -> Any:
    """How many arguments, and by name only, whether ``*args`` and ``**kwargs``, and names from outside."""
    more = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.co_argcount, code.co_kwonlyargcount, more, code.co_freevars


def _renamed(form: Form, names: dict[str, str]) -> Form:
    projections, between, after = (
        tuple(names[name] for name in each) for each in (form.projections, form.between, form.after)
    )
    return Form(names[form.down], names[form.activation], projections, form.is_gated, between, after)
