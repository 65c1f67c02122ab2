"""Write adapters as ``adapter_config.json`` and ``adapter_model.safetensors``, LoRA as PEFT does."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlora.anatomy.names import (
    Added,
    added,
    clean_name,
    named_modules,
    plain_tensor,
    require_lora_layers,
    tuner_parameters,
    unwrap,
)
from fastlora.anatomy.tied import is_inside, shared_parameters
from fastlora.inject.places import Place
from fastlora.inject.prompts import PromptPlace
from fastlora.inject.trained import trained_whole
from fastlora.state.folder import write_adapter
from fastlora.state.keys import PREFIX, adapter_key, file_part, prompt_key, tensor_slots
from fastlora.state.own_config import build_file_config
from fastlora.state.peft_config import build_config


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's LoRA layers, adapters and prompts, and what else of it trains, as an adapter folder.

    LoRA alone is written in PEFT's format, which ``PeftModel.from_pretrained(base_model, path)`` reads too;
    with bottleneck adapters or prompts, or LoRA on a layer that the model has under several names, the config
    is our own, and only :func:`fastlora.load_adapter` reads it. Of several named adapters the active one is
    written. Modules that train whole go into ``modules_to_save``, with all that share a parameter with them,
    so that PEFT, which unties them, computes the same. Both files are written completely before an older
    adapter is replaced. A merged model is saved like an unmerged one. In an ``nn.MultiheadAttention``, PEFT
    applies no dropout, and up to 0.21.2 it adds ``out_proj``'s update twice (huggingface/peft#3774). Beside
    an ``nn.Conv2d`` it ignores dilation and ``padding_mode`` unless merged; only these convolutions differ.

    Args:
        model: An adapted model; not changed. Sharded (FSDP2) parameters are gathered, on every rank.
        path: The folder, made if missing.

    Returns:
        The folder.

    Raises:
        ValueError: No LoRA layers, adapters or prompts, only some layers with ``rslora``, or a trainable
            parameter that the format can't hold because its module contains one of these.
        NotADirectoryError: ``path`` is a file or lies under one.
        PermissionError: ``path`` can't be written to.

    Example:
        >>> import tempfile
        >>> from fastlora import apply_lora
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 2)), rank=1)
        >>> sorted(file.name for file in save_adapter(model, tempfile.mkdtemp()).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    root = unwrap(model)
    here = added(root)
    if not here:
        require_lora_layers(root)
    if "" in here.layers or "" in here.places:
        raise ValueError(
            f"expected a model around its layers, got a bare {type(root).__name__}; "
            "put it into nn.Sequential, say, so that it has a name"
        )
    whole = trained_whole(root, here)
    folder = Path(path)
    write_adapter(folder, _tensors(root, here, whole), _config(root, here, whole))
    return folder


def _tensors(model: nn.Module, here: Added, whole: list[str]) -> dict[str, Tensor]:
    names = named_modules(model)
    tensors = {
        key: plain_tensor(file_part(owner, part))
        for name, layer in here.layers.items()
        for key, owner, part in tensor_slots(name, layer, dora=layer.dora)
    }
    for name, place in here.places.items():
        for part in place.adapter.adapter_params():
            tensors[adapter_key(name, part)] = plain_tensor(place.adapter.get_parameter(part))
    for name, module in here.prompts.items():
        tensors[prompt_key(name)] = plain_tensor(module.tokens)
    # PEFT takes every module whose name ends like one of the whole ones for another, and wants its tensors
    adapted = [*here.layers, *here.places, *here.prompts]
    alike = [name for name in names if name.endswith(tuple(whole))]
    taken = [name for name in alike if not any(a == name or is_inside(a, name) for a in adapted)]
    for name in dict.fromkeys([*whole, *taken]):
        for key, tensor in names[name].state_dict().items():
            tensors[f"{PREFIX}{name}.{clean_name(key)}"] = plain_tensor(tensor)
    return tensors


def _config(model: nn.Module, here: Added, whole: list[str]) -> dict[str, Any]:
    origin = getattr(model, "name_or_path", None)
    base_model = origin if isinstance(origin, str) else None
    names, layers = named_modules(model), here.layers
    ours = {id(parameter) for layer in layers.values() for parameter in tuner_parameters(layer)}
    # PEFT would adapt a layer with several names under the first alone
    several = any(id(holders[0].parameter) in ours for holders in shared_parameters(model))
    if not here.places and not here.prompts and not several:
        return build_config(layers, names, whole, base_model)
    return build_file_config(
        lora=build_config(layers, names, [], base_model) if layers else None,
        bottleneck={name: Place.of(place) for name, place in here.places.items()},
        prompts={name: PromptPlace.of(module) for name, module in here.prompts.items()},
        modules_to_save=whole,
    )
