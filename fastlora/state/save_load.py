"""Save and load adapters as ``adapter_config.json`` and ``adapter_model.safetensors``, LoRA as PEFT does."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.log import logger
from fastlora.anatomy.names import (
    adapted_modules,
    clean_name,
    lora_layers,
    named_modules,
    plain_tensor,
    prompt_modules,
    require_lora_layers,
    tuner_parameters,
    unwrap,
)
from fastlora.anatomy.targets import why_uncalled
from fastlora.anatomy.tied import any_tied, is_inside, shared_parameters, untie
from fastlora.anatomy.uncalled import bypassed
from fastlora.inject.lora import Model, add_lora, check_unadapted
from fastlora.inject.places import Place, add_adapters
from fastlora.inject.prompt_places import PromptPlace, add_prompts
from fastlora.inject.trained import train_only_tuners
from fastlora.inject.whole_modules import trained_whole
from fastlora.nn import AdaptedModule, LoRALayer, LoRAModule
from fastlora.nn.settings import LoRASettings
from fastlora.state.check import AdapterCheck
from fastlora.state.folder import read_adapter, write_adapter
from fastlora.state.keys import in_model_names
from fastlora.state.own_config import FileConfig, build_file_config
from fastlora.state.peft_config import AdapterConfig, build_config
from fastlora.state.slots import (
    PREFIX,
    adapter_key,
    file_dtype,
    file_part,
    fill_alpha,
    fill_part,
    prompt_key,
    tensor_slots,
)

_PEFT_APPLIES_TWICE = (
    "This adapter was saved by PEFT and covers nn.MultiheadAttention. PEFT up to 0.21.2 adds the update of "
    "out_proj twice (huggingface/peft#3774), fastlora once as defined; if it was trained with such a "
    "version, double every attention's out_proj.lora_B to get the outputs it had there."
)
_PEFT_CONVOLVES_OTHERWISE = (
    "This adapter was saved by PEFT and covers %s, an nn.Conv2d with dilation=%s and padding_mode=%r. PEFT's "
    "own forward pass knows neither (its merged weights do); fastlora uses the frozen layer's."
)
_TRAINS_APART = (
    "The adapters of tied layers in %s are equal, as PEFT trained them with ensure_weight_tying; here each "
    "trains by itself from now on."
)


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
    layers, places = lora_layers(root), adapted_modules(root)
    if not places and not prompt_modules(root):
        require_lora_layers(root)
    if "" in layers or "" in places:
        raise ValueError(
            f"expected a model around its layers, got a bare {type(root).__name__}; "
            "put it into nn.Sequential, say, so that it has a name"
        )
    whole = trained_whole(root)
    tensors = _tensors(root, layers, places, whole)
    config = _config(root, layers, places, whole)
    folder = Path(path)
    write_adapter(folder, tensors, config)
    return folder


def load_into_active(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load an adapter folder into a model, or into its active adapter; see :func:`fastlora.load_adapter`."""
    root = unwrap(model)
    folder = Path(path)
    tensors, config = in_model_names(root, *read_adapter(folder))
    targets: Mapping[str, nn.Module] = lora_layers(root)
    places, prompts = adapted_modules(root), prompt_modules(root)
    fresh = not targets and not places and not prompts
    check, by_peft = AdapterCheck(root, tensors), config.by_peft
    if fresh:
        check_unadapted(root)
    if config.lora is not None:
        targets = check.targets(by_peft=by_peft) if fresh else targets
        check.layers(targets, config.lora)
    else:
        check.no_layers(targets, "LoRA")
    if fresh:
        check.places(config.bottleneck)
        check.prompts(config.prompts)
    else:
        check.adapted(config.bottleneck, places)
        check.prompted(config.prompts, prompts)
    whole = check.whole_modules(
        [*config.modules_to_save, *_kept_tied(root, tensors, config)], by_peft=by_peft
    )
    apart = check.untied(root, whole, config.lora, fresh=fresh)
    copies = check.base_copies(root, fresh=fresh)
    check.finish(folder)
    _warn_of_uncalled(root, targets, folder)
    if config.lora is not None and config.lora.weight_tying and any_tied(targets.values()):
        logger.warning(_TRAINS_APART, folder)
    _take_base(copies, folder)
    untie(root, apart)
    if fresh:
        _build(root, targets, tensors, config, list(whole.values()))
    _fill(root, targets, whole, tensors, config)
    return model


def _kept_tied(model: nn.Module, tensors: Mapping[str, Tensor], config: FileConfig) -> set[str]:
    """Modules that PEFT trained as one with those in modules_to_save, which its config does not name."""
    if config.lora is None or not config.lora.weight_tying:
        return set()
    named = config.modules_to_save
    groups = [{holder.owner for holder in holders} for holders in shared_parameters(model)]
    tied = [owners for owners in groups if any(owner.endswith(named) for owner in owners)]
    return {owner for owner in set().union(*tied) if f"{PREFIX}{owner}.weight" in tensors}


def holds_whole(model: nn.Module, tensors: Mapping[str, Tensor], config: FileConfig) -> bool:
    """Whether the file has modules that train whole, not only names of them."""
    return bool(AdapterCheck(model, tensors).whole_modules(config.modules_to_save, by_peft=config.by_peft))


def _warn_of_uncalled(model: nn.Module, targets: Mapping[str, nn.Module], folder: Path) -> None:
    """PEFT adapts layers that are never called too; loaded, such updates do nothing until they are merged."""
    uncalled = bypassed(named_modules(model), targets.values())
    if uncalled:
        logger.warning(
            "%d of the %d layers in %s do nothing, %s; don't merge them",
            len(uncalled),
            len(targets),
            folder,
            why_uncalled(uncalled),
        )


@torch.no_grad()
def _take_base(copies: list[tuple[Tensor, Tensor]], folder: Path) -> None:
    """Set frozen weights to those that the adapter was trained on."""
    for tensor, values in copies:
        tensor.copy_(values)
    if copies:
        logger.warning("%d frozen tensors of the model were replaced by those in %s", len(copies), folder)


def _tensors(
    model: nn.Module,
    layers: Mapping[str, LoRAModule],
    places: Mapping[str, AdaptedModule],
    whole: list[str],
) -> dict[str, Tensor]:
    names = named_modules(model)
    tensors = {
        key: plain_tensor(file_part(owner, part))
        for name, layer in layers.items()
        for key, owner, part in tensor_slots(name, layer, dora=layer.dora)
    }
    for name, place in places.items():
        for part in place.adapter.adapter_params():
            tensors[adapter_key(name, part)] = plain_tensor(place.adapter.get_parameter(part))
    prompts = prompt_modules(model)
    for name, module in prompts.items():
        tensors[prompt_key(name)] = plain_tensor(module.tokens)
    # PEFT takes every module whose name ends like one of the whole ones for another, and wants its tensors
    adapted = [*layers, *places, *prompts]
    alike = [name for name in names if name.endswith(tuple(whole))]
    taken = [name for name in alike if not any(a == name or is_inside(a, name) for a in adapted)]
    for name in dict.fromkeys([*whole, *taken]):
        for key, tensor in names[name].state_dict().items():
            tensors[f"{PREFIX}{name}.{clean_name(key)}"] = plain_tensor(tensor)
    return tensors


def _config(
    model: nn.Module,
    layers: Mapping[str, LoRAModule],
    places: Mapping[str, AdaptedModule],
    whole: list[str],
) -> dict[str, Any]:
    origin = getattr(model, "name_or_path", None)
    base_model = origin if isinstance(origin, str) else None
    names, prompts = named_modules(model), prompt_modules(model)
    ours = {id(parameter) for layer in layers.values() for parameter in tuner_parameters(layer)}
    # PEFT would adapt a layer with several names under the first alone
    several = any(id(holders[0].parameter) in ours for holders in shared_parameters(model))
    if not places and not prompts and not several:
        return build_config(layers, names, whole, base_model)
    return build_file_config(
        lora=build_config(layers, names, [], base_model) if layers else None,
        bottleneck={name: Place.of(place) for name, place in places.items()},
        prompts={name: PromptPlace.of(module) for name, module in prompts.items()},
        modules_to_save=whole,
    )


def _build(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    config: FileConfig,
    whole: list[nn.Module],
) -> None:
    if config.lora is not None:
        plan = {module: file_layer(name, module, tensors, config.lora) for name, module in targets.items()}
        add_lora(model, plan)
    add_adapters(model, config.bottleneck, adapter_dtype=None)
    for name, place in adapted_modules(model).items():
        keys = [adapter_key(name, part) for part in place.adapter.adapter_params()]
        place.adapter.to(file_dtype(tensors, keys))
    add_prompts(named_modules(model), config.prompts)
    train_only_tuners(model, whole)


def file_layer(
    name: str, layer: nn.Module, tensors: Mapping[str, Tensor], config: AdapterConfig
) -> LoRASettings:
    """What a file says of one layer, in the dtype that its tensors have there."""
    settings = config.settings(name)
    keys = [key for key, _, _ in tensor_slots(name, layer, dora=settings.dora) if key in tensors]
    return replace(settings, adapter_dtype=file_dtype(tensors, keys) if keys else None)


@torch.no_grad()
def _fill(
    model: nn.Module,
    targets: Iterable[str],
    whole: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    config: FileConfig,
) -> None:
    names, places = named_modules(model), adapted_modules(model)
    if config.lora is not None:
        _fill_lora({name: names[name] for name in targets}, tensors, config.lora)
    for name, place in config.bottleneck.items():
        adapter = places[name].adapter
        for part in adapter.adapter_params():
            adapter.get_parameter(part).copy_(tensors[adapter_key(name, part)])
        if isinstance(place.settings.scale, float):
            adapter.scale = place.settings.scale
    for name, prompts in prompt_modules(model).items():
        prompts.tokens.copy_(tensors[prompt_key(name)])
    for name, module in whole.items():
        for key, tensor in module.state_dict().items():
            tensor.copy_(tensors[f"{PREFIX}{name}.{clean_name(key)}"])


def _fill_lora(layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], config: AdapterConfig) -> None:
    for name, layer in layers.items():
        settings = config.settings(name)
        for key, owner, part in tensor_slots(name, layer, dora=settings.dora):
            assert isinstance(owner, LoRAModule)
            owner.unmerge()
            fill_part(owner, part, tensors[key])
            fill_alpha(owner, settings.alpha, rslora=settings.rslora)
    if config.by_peft and any(isinstance(layer, nn.MultiheadAttention) for layer in layers.values()):
        logger.warning(_PEFT_APPLIES_TWICE)
    for name, layer in layers.items():
        conv = layer.original_layer if isinstance(layer, LoRALayer) else layer
        odd = isinstance(conv, nn.Conv2d) and (conv.padding_mode != "zeros" or set(conv.dilation) != {1})
        if config.by_peft and odd:
            logger.warning(_PEFT_CONVOLVES_OTHERWISE, name, conv.dilation, conv.padding_mode)
            break
