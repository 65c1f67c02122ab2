"""LoRA layers that share x: the first one's call computes them all.

Siblings are layers that their module's forward calls with one variable, by its source. What is computed
for a layer ahead of its call is taken only if nothing has changed by then: x is the same tensor with the same
values, the layer's parts are what they were, and so are the stream and autograd's and autocast's settings.
Else a layer computes alone, and where none draws a dropout mask and, on a GPU, none trains, elsewhere no
gradient of x is wanted. Nothing is learned from calls, so that the first step, a resumed one and one that a
checkpoint repeats compute alike.
A change that autograd's counter of versions misses (``tensor.data.mul_(2)``) is not seen.
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
from fastlora.together.compute import completed, has_masks_apart, lora, lora_of_several
from fastlora.together.parts import LayerOfParts, Parts, is_called_plainly
from fastlora.together.sources import sharing
from fastlora.together.state import of_call, of_layer

# where a layer, one of parts, has its place, and a module its groups
_PLACE, _GROUPS = "_siblings", "_sibling_groups"


class Group:
    """Siblings, in the order of their calls: children of a module, by their names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """Of these children, of a module that :class:`_Groups` tells."""
        self.names = names
        self.parent: weakref.ref[nn.Module] | None = None
        self.kept = _Kept()

    def __reduce__(self) -> Any:
        """A copied layer brings its siblings only if their module is copied."""
        return Group, (self.names,)

    def layer(self, number: int) -> Any:
        """Whom the module calls in a place; None if there is nobody, or no module."""
        parent = None if self.parent is None else self.parent()
        return None if parent is None else parent._modules.get(self.names[number])

    def layers(self) -> list[Any] | None:
        """All siblings; None if the module calls a wrapper or another layer in place of one."""
        layers = [self.layer(number) for number in range(len(self.names))]
        places = [None if layer is None else layer.__dict__.get(_PLACE) for layer in layers]
        return layers if places == [Place(self, number) for number in range(len(layers))] else None


class Place(NamedTuple):
    """A layer's place in its group."""

    group: Group
    number: int


class _Groups:
    """What a module has of groups, which its copies have of their own."""

    def __init__(self, parent: nn.Module | None, groups: list[Group]) -> None:
        """Make these groups the module's."""
        self.parent, self.groups = None if parent is None else weakref.ref(parent), groups
        for group in groups:
            group.parent = self.parent

    def __reduce__(self) -> Any:
        """With the module itself, so that a copied one is that of the copied groups."""
        return _Groups, (None if self.parent is None else self.parent(), self.groups)


class _Ahead(NamedTuple):
    """What was computed ahead of calls.

    Attributes:
        x: The input of all, which this does not keep.
        state: What :func:`of_call` was.
        has_run: Not empty once the backward pass of what was computed has run.
        outputs: For each layer's number what its output was computed from, and the output.
    """

    x: TensorWeakRef
    state: Any
    has_run: list[bool]
    outputs: dict[int, tuple[Any, Tensor]]


class _Kept(threading.local):
    """What each thread has computed ahead for a group; it goes with the group, and so with the model."""

    ahead: _Ahead | None = None


class _Thread(threading.local):
    """The group for which a thread has computed ahead: at most one's outputs are kept in vain."""

    group: weakref.ref[Group] | None = None

    def keep(self, group: Group, ahead: _Ahead) -> None:
        """Leave what was computed to the next call."""
        group.kept.ahead, self.group = ahead, weakref.ref(group)

    def take(self) -> tuple[Group | None, _Ahead | None]:
        """What was left, and for whom; it is left no longer."""
        group = None if self.group is None else self.group()
        self.group = None
        if group is None:
            return None, None
        ahead, group.kept.ahead = group.kept.ahead, None
        return group, ahead


_thread = _Thread()


def find(model: nn.Module) -> None:
    """Give siblings among a model's LoRA layers their places."""
    for module in model.modules():
        forget(module)
    for module in model.modules():
        # one that has a place is called in another module, too
        found = sharing(module, LayerOfParts, lambda layer: _PLACE not in layer.__dict__)
        groups = [Group(tuple(names)) for names in found]
        for group in groups:
            for number, name in enumerate(group.names):
                module._modules[name].__dict__[_PLACE] = Place(group, number)
        if groups:
            module.__dict__[_GROUPS] = _Groups(module, groups)


def forget(module: Any) -> None:
    """Take a layer out of its group, and a module's groups away; what was computed ahead is dropped."""
    place, groups = (module.__dict__.pop(name, None) for name in (_PLACE, _GROUPS))
    if place is not None and place.group.parent is not None:
        parent = place.group.parent()
        if parent is not None:
            parent.__dict__.pop(_GROUPS, None)
    if place is not None or groups is not None:
        _thread.take()


def compute(layer: Any, x: Tensor, parts: Parts) -> Tensor:
    """The layer's output: taken, if it was computed ahead, or computed, as a first sibling with all others.

    Args:
        layer: A LoRA layer.
        x: ``[..., in_features]``.
        parts: What the call is computed from.
    """
    if torch.compiler.is_compiling():
        return completed(lora(x, parts), x, parts)
    place = layer.__dict__.get(_PLACE)
    # a replica of data parallel's has the place of another, and a wrapper is called in place of what it wraps
    if place is not None and (backend.is_watched() or place.group.layer(place.number) is not layer):
        place = None
    y = _taken(place, x, parts)
    if y is None and place is not None and place.number == 0:
        y = _with_siblings(place.group, x, parts)
    return completed(lora(x, parts) if y is None else y, x, parts)


def together(layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
    """Each layer's output for one x; None where that gains nothing, or one has to compute its own."""
    if torch.compiler.is_compiling() or backend.is_watched():
        return None
    parts = _parts(layers, x) if _share(layers, x) else None
    if parts is None:
        return None
    ys = lora_of_several(x, parts, one_mask=_have_one_mask(layers))
    return [completed(y, x, of_y) for y, of_y in zip(ys, parts, strict=True)]


def _with_siblings(group: Group, x: Tensor, parts: Parts) -> Tensor | None:
    """The first one's output, if its siblings' are computed, too; they are left for their calls."""
    layers = group.layers()
    if layers is None or not _share(layers, x):
        return None
    first, *siblings = layers
    # a hook on the first alone, or whatever else calls it, may give it another x
    plainly = is_called_plainly(first) and _can_share(parts, x)
    found = _parts(siblings, x) if plainly else None
    if found is None:
        return None
    y, *others = lora_of_several(x, [parts, *found], one_mask=_have_one_mask(layers))
    has_run = list[bool]()
    if y.grad_fn is not None:
        y.grad_fn.register_hook(functools.partial(_note, has_run))
    outputs = {
        number: (of_layer(p), y) for number, (p, y) in enumerate(zip(found, others, strict=True), start=1)
    }
    _thread.keep(group, _Ahead(TensorWeakRef(x), of_call(x), has_run, outputs))
    return y


def _have_one_mask(layers: Sequence[Any]) -> bool:
    return all(layer._one_mask for layer in layers)


def _note(has_run: list[bool], *gradients: Any) -> None:
    has_run.append(True)


def _taken(place: Place | None, x: Tensor, parts: Parts) -> Tensor | None:
    """What was computed ahead of this very call; anything else that was is dropped."""
    group, ahead = _thread.take()
    if group is None or ahead is None or place is None or place.group is not group or ahead.has_run:
        return None
    if ahead.x() is not x or ahead.state != of_call(x):
        return None
    what, y = ahead.outputs.pop(place.number, (None, None))
    if what is None or what != of_layer(parts):
        return None
    if ahead.outputs:
        _thread.keep(group, ahead)
    return y


def _parts(layers: Sequence[Any], x: Tensor) -> list[Parts] | None:
    """What the layers' calls would be computed from; None if one is told by its layer alone, or by a hook."""
    found = list[Parts]()
    for layer in layers:
        parts = layer._parts_of(x) if is_called_plainly(layer) else None
        if parts is None or not _can_share(parts, x):
            return None
        found.append(parts)
    return found


def _share(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether layers compute together: what a reentrant checkpoint first runs without gradients as what it
    then repeats with them.

    Kernels that read x once for all may give other bits, so on a GPU it counts whether layers train; else
    whether there is a gradient to sum where it lies. Masks are always drawn at once, because a checkpoint may
    draw other numbers between two calls.
    """
    # of an inference tensor nothing tells that it has changed, and no checkpoint repeats it
    if x.is_inference():
        return False
    if x.is_cuda or backend.selected() == "triton":
        gains = any(layer.training for layer in layers)
    else:
        gains = x.requires_grad and torch.is_grad_enabled()
    return gains or any(layer._draws_masks() for layer in layers)


def _can_share(parts: Parts, x: Tensor) -> bool:
    dora = any(adapter.magnitude is not None for adapter in parts.adapters)
    return not dora and parts.weight.device == x.device and not has_masks_apart(parts)
