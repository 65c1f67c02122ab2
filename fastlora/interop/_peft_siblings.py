"""PEFT's LoRA layers that share x: the first one's call computes them all.

Siblings are fused layers that their module's forward calls with one variable, by its source. What is computed
for a layer ahead of its call is taken only if nothing has changed by then: x is the same tensor with the same
values, the layer's parts are what they were, and so are autograd's and autocast's settings. Else, and where
no gradient of x is wanted, a layer computes alone. Nothing is learned from calls, so that the first step, a
resumed one and one that a checkpoint repeats compute alike.
"""

import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from fastlora._core import backend
from fastlora.interop._peft_compute import completed, has_masks_apart, lora, lora_of_several
from fastlora.interop._peft_parts import Parts, is_called_plainly
from fastlora.interop._sources import Call, events_of
from fastlora.ops.runtime import autocast_dtype
from fastlora.ops.weights.frozen import FrozenWeight

_NAME = "_siblings"


class Group:
    """Siblings, in the order of their calls; the layers hold it, not it the layers."""

    def __init__(self, size: int) -> None:
        """With so many places, all free."""
        self._layers: list[weakref.ref[Any] | None] = [None] * size

    def __reduce__(self) -> Any:
        """Of a copied layer's siblings those are its own that are copied with it: each joins again."""
        return Group, (len(self._layers),)

    def join(self, number: int, layer: Any) -> None:
        """Give a layer its place, unless that is another one's."""
        if self.layer(number) is None:
            self._layers[number] = weakref.ref(layer)

    def layer(self, number: int) -> Any:
        """Who has a place; None where it is free."""
        layer = self._layers[number]
        return None if layer is None else layer()

    def after_the_first(self) -> list[Any] | None:
        """All layers but the first; None if one is gone, or in another group by now."""
        layers = [self.layer(number) for number in range(1, len(self._layers))]
        places = [None if layer is None else layer.__dict__.get(_NAME) for layer in layers]
        return layers if all(place is not None and place.group is self for place in places) else None


class Place(NamedTuple):
    """A layer's place in its group."""

    group: Group
    number: int


class _Ahead(NamedTuple):
    """What was computed ahead of calls.

    Attributes:
        group: What the layers that it was computed for belong to.
        x: The input of all, which this does not keep.
        state: What :func:`_state_of_call` was.
        has_run: Not empty once the backward pass of what was computed has run.
        outputs: For each layer's number what its output was computed from, and the output.
    """

    group: Group
    x: TensorWeakRef
    state: Any
    has_run: list[bool]
    outputs: dict[int, tuple[Any, Tensor]]


class _Thread(threading.local):
    """What a thread has computed ahead, of all groups: at most one group's outputs are kept in vain."""

    ahead: _Ahead | None = None


_thread = _Thread()


def find(model: nn.Module, kind: type) -> None:
    """Give siblings among a model's layers of this class their places."""
    for module in model.modules():
        if isinstance(module, kind):
            forget(module)
    for module in model.modules():
        for layers in _sharing(module, kind) if "forward" not in vars(module) else ():
            group = Group(len(layers))
            for number, layer in enumerate(layers):
                layer.__dict__[_NAME] = Place(group, number)
                group.join(number, layer)


def _sharing(module: nn.Module, kind: type) -> list[list[Any]]:
    """Layers of a module, without a place yet, that its forward calls with one variable."""
    children = dict(module.named_children())
    with_layers = {
        name for name, each in children.items() if any(isinstance(m, kind) for m in each.modules())
    }
    runs, current = list[list[Any]](), dict[str, list[Any]]()
    for event in events_of(type(module).forward) if len(with_layers) > 1 else ():
        if not isinstance(event, Call):
            # the variable is another value from here on
            current.pop(event, None)
        elif event.module in with_layers:
            layer = children[event.module]
            run = current.get(event.argument or "")
            if not isinstance(layer, kind) or _NAME in layer.__dict__ or event.argument is None:
                current.clear()
            elif run is None or layer in run or layer.in_features != run[0].in_features:
                # what is called between two siblings' calls would drop what was computed ahead
                current = {event.argument: [layer]}
                runs.append(current[event.argument])
            else:
                current = {event.argument: run}
                run.append(layer)
    found = list[list[Any]]()
    for run in runs:
        if len(run) > 1 and not any(layer in other for other in found for layer in run):
            found.append(run)
    return found


def forget(layer: Any) -> None:
    """Take a layer out of its group; what was computed ahead of calls is dropped."""
    if layer.__dict__.pop(_NAME, None) is not None:
        _thread.ahead = None


def join_again(layer: Any) -> None:
    """Give a copied layer its place among those that are copied with it."""
    place = layer.__dict__.get(_NAME)
    if place is not None:
        place.group.join(place.number, layer)


def compute(layer: Any, x: Tensor, parts: Parts) -> Tensor:
    """The layer's output: taken, if it was computed ahead, or computed, as a first sibling with all others.

    Args:
        layer: A fused layer.
        x: ``[..., in_features]``.
        parts: What the call is computed from.
    """
    if torch.compiler.is_compiling():
        return completed(lora(x, parts), x, parts)
    place = layer.__dict__.get(_NAME)
    # a replica of data parallel's has the place of another
    if place is not None and (backend.is_watched() or place.group.layer(place.number) is not layer):
        place = None
    y = _taken(place, x, parts)
    if y is None and place is not None and place.number == 0:
        y = _with_siblings(place.group, x, parts)
    return completed(lora(x, parts) if y is None else y, x, parts)


def together(layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
    """Each fused layer's output for one x; None where that gains nothing, or PEFT has to compute one."""
    if torch.compiler.is_compiling() or backend.is_watched():
        return None
    parts = _parts(layers, x)
    if parts is None:
        return None
    return [completed(y, x, of_y) for y, of_y in zip(lora_of_several(x, parts), parts, strict=True)]


def _with_siblings(group: Group, x: Tensor, parts: Parts) -> Tensor | None:
    """The first one's output, if its siblings' are computed, too; they are left for their calls."""
    siblings = group.after_the_first()
    found = None if siblings is None or not _can_share(parts, x) else _parts(siblings, x)
    if found is None:
        return None
    y, *others = lora_of_several(x, [parts, *found])
    has_run = list[bool]()
    if y.grad_fn is not None:
        y.grad_fn.register_hook(functools.partial(_note, has_run))
    outputs = {
        number: (_what(p), y) for number, (p, y) in enumerate(zip(found, others, strict=True), start=1)
    }
    _thread.ahead = _Ahead(group, TensorWeakRef(x), _state_of_call(x), has_run, outputs)
    return y


def _note(has_run: list[bool], *gradients: Any) -> None:
    has_run.append(True)


def _taken(place: Place | None, x: Tensor, parts: Parts) -> Tensor | None:
    """What was computed ahead of this very call; anything else that was is dropped."""
    ahead, _thread.ahead = _thread.ahead, None
    if ahead is None or place is None or ahead.group is not place.group or ahead.has_run:
        return None
    if ahead.x() is not x or ahead.state != _state_of_call(x):
        return None
    what, y = ahead.outputs.pop(place.number, (None, None))
    if what is None or what != _what(parts):
        return None
    if ahead.outputs:
        _thread.ahead = ahead
    return y


def _parts(layers: Sequence[Any], x: Tensor) -> list[Parts] | None:
    """What the layers' calls would be computed from; None if one is PEFT's, or would be noticed by a hook."""
    if not _gains(x):
        return None
    found = list[Parts]()
    for layer in layers:
        parts = layer.fused_parts(x) if is_called_plainly(layer) else None
        if parts is None or not _can_share(parts, x):
            return None
        found.append(parts)
    return found


def _gains(x: Tensor) -> bool:
    """Whether there is a gradient to sum where it lies."""
    return x.requires_grad and torch.is_grad_enabled()


def _can_share(parts: Parts, x: Tensor) -> bool:
    dora = any(adapter.magnitude is not None for adapter in parts.adapters)
    return not dora and parts.weight.device == x.device and not has_masks_apart(parts)


def _what(parts: Parts) -> Any:
    """All that an output depends on, of a layer, to be compared."""
    weight = parts.weight
    stored = weight.tensors if isinstance(weight, FrozenWeight) else (weight,)
    adapters = [(*map(_state, adapter[:3]), *adapter[3:5]) for adapter in parts.adapters]
    return [*map(_state, (*stored, parts.bias)), *adapters]


def _state_of_call(x: Tensor) -> Any:
    """All that an output depends on beside the layer."""
    autograd: Any = torch._C._autograd
    # of a checkpoint, or of whoever moves what is kept elsewhere
    hooks = autograd._top_saved_tensors_default_hooks(True)
    return _state(x), torch.is_grad_enabled(), autocast_dtype(x), backend.selected(), hooks


def _state(tensor: Tensor | None) -> Any:
    """What tells whether a tensor's values, or its part in autograd, have changed."""
    if tensor is None:
        return None
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad
