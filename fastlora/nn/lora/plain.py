"""A LoRA layer's state dict as that of the plain layer it computes as: its update in the weight.

A merged layer's is just that. While a library writes a model with a layer that is not merged
(``save_pretrained``), A and B stay beside it under names that say so, ``lora_merged.lora_A``: the plain model
reads the weights, and the adapted one takes the update out of them again.
"""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.log import logger
from fastlora.nn.lora.folding import unfold
from fastlora.nn.lora.shelf import SHELF
from fastlora.nn.lora.start import START_A, START_B, follow_start, take_start
from fastlora.nn.lora.update import LoRAUpdate
from fastlora.ops.weights.frozen import FrozenWeight

# before the names of A and B beside a weight that holds their product
MERGED = "lora_merged."
_MARK = "merged"


@dataclass(frozen=True)
class Form:
    """How layers that are not merged write themselves.

    Attributes:
        keep_updates: Whether A and B stay beside the weight that holds them.
    """

    keep_updates: bool


_form: ContextVar[Form | None] = ContextVar("fastlora_plain_form", default=None)


@contextlib.contextmanager
def plain_states(*, keep_updates: bool) -> Iterator[None]:
    """Let every state dict that is taken in here hold plain weights."""
    token = _form.set(Form(keep_updates))
    try:
        yield
    finally:
        _form.reset(token)


def write_plain(layer: LoRAUpdate, state: dict[str, Any], prefix: str) -> None:
    """Turn what a layer wrote into a state dict into what its plain layer would, where that is wanted."""
    if layer.merged:
        _drop_update(layer, state, prefix, keep=False)
        return
    form = _form.get() or (Form(keep_updates=True) if _inside("save_pretrained") else None)
    if form is not None and can_fold(layer):
        fold_state(layer, state, prefix, keep=form.keep_updates)


def _inside(function: str) -> bool:
    """Whether a function of this name is running.

    A model around the one that was adapted (``apply_lora(classifier.bert)``) is unknown to us until it asks
    its layers for their state.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


def can_fold(layer: LoRAUpdate) -> bool:
    """Whether a weight can hold the update; most can, no quantised one can."""
    if isinstance(layer._stored(), FrozenWeight):
        return False
    try:
        layer.check_mergeable()
    except ValueError:
        return False
    return True


@torch.no_grad()
def fold_state(layer: LoRAUpdate, state: dict[str, Any], prefix: str, *, keep: bool) -> None:
    """Put the update that a state dict holds for this layer into the weight that it holds."""
    key = _weight_key(layer, prefix)
    if key not in state:
        return
    weight = _whole(state[key])
    # on to the CPU, where it is bound for: a second set of weights may not fit beside the model
    state[key] = _with_parts(layer, state, prefix, weight.device)._fold(weight).to("cpu")
    _drop_update(layer, state, prefix, keep=keep)


def _drop_update(layer: LoRAUpdate, state: dict[str, Any], prefix: str, *, keep: bool) -> None:
    for name in _own_names(layer):
        tensor = state.pop(prefix + name, None)
        if keep and tensor is not None:
            state[f"{prefix}{MERGED}{name}"] = tensor
    if layer._weight_owner() is not layer:
        for name in ("weight", "bias"):
            if f"{prefix}original_layer.{name}" in state:
                state[prefix + name] = state.pop(f"{prefix}original_layer.{name}")
        for name in [name for name in state if name.startswith(f"{prefix}original_layer.")]:
            statistic = state.pop(name)
            # a weight that is dense by now has none, a quantised one's have the names of its own layer
            if not layer._copied:
                state[prefix + name.removeprefix(f"{prefix}original_layer.")] = statistic
    metadata = getattr(state, "_metadata", None)
    if metadata is not None and not keep:
        metadata.setdefault(prefix[:-1], {})[_MARK] = True


def before_load(
    layer: LoRAUpdate, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], errors: list[str]
) -> None:
    """Make of a state dict what this layer has to load: of a plain one too, and of one in merged form."""
    if not _holds_same(layer, state, prefix):
        layer.unmerge()
    key, kept = _weight_key(layer, prefix), [name for name in state if name.startswith(prefix + MERGED)]
    for name in kept:
        state[prefix + name.removeprefix(prefix + MERGED)] = state.pop(name)
    if kept and key not in state:
        errors.append(f"expected {key} together with {kept[0]}, got it without; load both from one file")
    elif kept:
        _take_out(layer, state, prefix, errors)
    elif key in state and not layer.merged and _lacks_update(layer, state, prefix):
        _check_other_weight(layer, state[key], merged=bool(metadata.get(_MARK)))
    follow_start(layer, state, prefix)


def after_load(layer: LoRAUpdate, state: dict[str, Any], prefix: str, missing: list[str]) -> None:
    """Report no update as missing that need not be there.

    A plain layer's state dict is complete without an adapter; half an adapter, or none at all to fill meta
    tensors with, is not.
    """
    names = layer.adapter_params()
    if not _lacks_update(layer, state, prefix) or layer.get_parameter(names[0]).is_meta:
        return
    own = {prefix + name for name in names}
    missing[:] = [key for key in missing if key not in own]
    for name, tensor in _shelved(layer).items():
        state.setdefault(prefix + name, tensor)
    fresh = not all(layer.get_parameter(name).any() for name in names[:2])
    if layer.dora and fresh:
        key = _weight_key(layer, prefix)
        if key in state and layer._weight_owner() is not layer:
            # a layer inside this one has not loaded its weight yet
            with torch.no_grad():
                layer._weight().copy_(state[key])
        # the output stays the frozen layer's, also with another weight
        layer._reset_magnitude()


def _lacks_update(layer: LoRAUpdate, state: Mapping[str, Any], prefix: str) -> bool:
    return not any(prefix + name in state for name in layer.adapter_params())


def _holds_same(layer: LoRAUpdate, state: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state dict is the plain one that this layer, merged, writes."""
    given = state.get(_weight_key(layer, prefix))
    plain = layer.merged and _lacks_update(layer, state, prefix)
    return plain and isinstance(given, Tensor) and _equal(layer._weight(), given)


@torch.no_grad()
def _take_out(layer: LoRAUpdate, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
    key = _weight_key(layer, prefix)
    merged, frozen = state[key], layer._weight()
    if not frozen.is_meta and frozen.shape == merged.shape:
        again = _with_parts(layer, state, prefix, frozen.device)._fold(frozen.detach()).to(merged)
        if torch.allclose(again, merged, rtol=8 * torch.finfo(merged.dtype).eps, atol=1e-12):
            # the weight that was trained beside, bit for bit
            state[key] = frozen.detach()
            return
    if layer.dora:
        errors.append(
            f"expected {key} of the model that was adapted, got another one: with DoRA the saved weight does "
            "not tell the frozen one; build the model from the same pretrained weights before loading"
        )
        return
    warnings.warn(
        "the model has other frozen weights than those that were adapted; these are computed from the merged "
        "weights in the state dict, which rounds them; build the model from the same pretrained weights",
        stacklevel=2,
    )
    given = _with_parts(layer, state, prefix, merged.device)
    state[key] = unfold(merged, *layer._layout.factors(*given._factors()), layer.scaling)


@torch.no_grad()
def _check_other_weight(layer: LoRAUpdate, given: Tensor, *, merged: bool) -> None:
    """A plain weight comes alone: the update that it holds must not be added again, and others not unseen."""
    pair = layer._pair()
    if pair[0].is_meta or not all(part.any() for part in pair):
        return
    if merged:
        logger.debug("the loaded weights hold an update already: %s starts afresh", type(layer).__name__)
        take_start(layer)
        layer.get_parameter(layer._layout.zero).zero_()
    elif not _equal(layer._weight(), given):
        warnings.warn(
            "a state dict without A and B brings other weights, and the model keeps its own A and B, which "
            "are not zero: if these weights hold an update already (a merged model's), it counts twice now; "
            "load into a model with fresh updates, or into one without LoRA",
            stacklevel=2,
        )


def _equal(weight: Tensor, given: Tensor) -> bool:
    if weight.is_meta or given.is_meta or weight.shape != given.shape:
        return False
    return torch.equal(weight, given.to(weight))


def _weight_key(layer: LoRAUpdate, prefix: str) -> str:
    inner = "" if layer._weight_owner() is layer else "original_layer."
    return f"{prefix}{inner}{layer._weight_name}"


def _own_names(layer: LoRAUpdate) -> list[str]:
    return [*layer.adapter_params(), START_A, START_B, *_shelved(layer)]


def _shelved(layer: LoRAUpdate) -> dict[str, Tensor]:
    shelf = layer._modules.get(SHELF)
    return {} if shelf is None else {f"{SHELF}.{name}": value for name, value in shelf.state_dict().items()}


def _with_parts(layer: LoRAUpdate, state: Mapping[str, Any], prefix: str, device: torch.device) -> LoRAUpdate:
    """This layer with the A, B and magnitude of a state dict, to compute with; its own stay."""
    changed = copy.copy(layer)
    changed.__dict__["_parameters"] = dict(layer._parameters)
    changed.__dict__["_buffers"] = {}
    for name in (*layer.adapter_params(), START_A, START_B):
        if prefix + name in state:
            tensor = _whole(state[prefix + name]).to(device)
            if name in layer._parameters:
                changed._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                changed._buffers[name] = tensor
    return changed


def _whole(tensor: Tensor) -> Tensor:
    """Gathered if it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole.detach()
