"""``save_pretrained`` of a model with our modules in it: the plain model reads what this one computes.

Hugging Face's libraries write a model's own state dict, from which ``from_pretrained`` takes the plain
model's names and drops A and B: the training would be gone in silence.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sized
from typing import Any

from torch import nn

from fastlora._core.log import logger
from fastlora.anatomy.names import Added, added, clean_name, holds_tuner
from fastlora.inject.merged_config import merged_config
from fastlora.nn import LoRAModule
from fastlora.nn.lora.plain import can_fold, fold_state, plain_states

SAVE = "save_pretrained"
# in bytes: more than any model has
_ONE_FILE = 2**60


def save_training_too(model: nn.Module) -> None:
    """Let every ``save_pretrained`` in a model, where something of ours is inside, write what it computes."""
    for module in model.modules():
        if SAVE not in vars(module) and callable(getattr(type(module), SAVE, None)) and holds_tuner(module):
            vars(module)[SAVE] = functools.partial(_save, module)


def forget_saving(model: nn.Module) -> None:
    """Give back every ``save_pretrained`` where nothing of ours is left."""
    for module in model.modules():
        if isinstance(vars(module).get(SAVE), functools.partial) and not holds_tuner(module):
            delattr(module, SAVE)


def _save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As the class's own, with every update in its weight.

    A and B of layers that are not merged are written beside it, so that a training can go on from there; in
    one file, as they must be read together with their weight.
    """
    save = getattr(type(model), SAVE)
    call = inspect.signature(save).bind(model, *args, **kwargs)
    shards = "max_shard_size" in inspect.signature(save).parameters
    keep = "max_shard_size" not in call.arguments
    if keep and shards:
        call.arguments["max_shard_size"] = _ONE_FILE
    state = call.arguments.get("state_dict")
    if state is not None:
        call.arguments["state_dict"] = _folded(model, state, keep=keep)
    here = added(model)
    lost = _cannot_be_plain(here)
    if lost:
        logger.warning(
            "%s.save_pretrained: from_pretrained can't read %s, and the model that it makes computes without "
            "them; save them with fastlora.save_adapter(model, folder), and read them with "
            "fastlora.load_adapter(model, folder)",
            type(model).__name__,
            " and ".join(lost),
        )
    if here.layers:
        logger.info(
            "%s.save_pretrained: updates are written into their weights%s",
            type(model).__name__,
            ", A and B beside them as lora_merged.*" if keep else "",
        )
    with plain_states(keep_updates=keep), untied_config(model), merged_config(model):
        return save(*call.args, **call.kwargs)


def _folded(model: nn.Module, state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """A state dict that was taken before, a sharded model's, say, with the updates in the weights."""
    folded = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, LoRAModule) and not module.merged and can_fold(module):
            fold_state(module, folded, f"{clean_name(name)}.", keep=keep)
    return folded


def _cannot_be_plain(here: Added) -> list[str]:
    unfoldable = [name for name, layer in here.layers.items() if not can_fold(layer)]
    found: dict[str, Sized] = {
        "bottleneck adapters": here.places,
        "prompts": here.prompts,
        "LoRA that no weight can hold": unfoldable,
    }
    return [f"{kind} ({len(places)})" for kind, places in found.items() if places]


@contextlib.contextmanager
def untied_config(model: nn.Module) -> Iterator[None]:
    """Let the config say meanwhile whether weights are tied that updates move apart."""
    config = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", False) is True
    if config is None or not tied or not moved_apart(model):
        yield
        return
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        config.tie_word_embeddings = True


def moved_apart(model: nn.Module) -> dict[str, list[str]]:
    """LoRA layers whose frozen weight other modules hold too, and these: merged, they are tied no longer."""
    holders: dict[int, list[str]] = {}
    layers: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRAModule):
            weight = module._unmerged[0] if module._unmerged else module._weight()
            layers[clean_name(name)] = id(weight)
            holders.setdefault(id(weight), []).append(clean_name(name))
        else:
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append(clean_name(name))
    inner = {f"{name}.original_layer" for name in layers}
    others = {
        name: [other for other in holders[weight] if other != name and other not in inner]
        for name, weight in layers.items()
    }
    return {name: found for name, found in others.items() if found}
