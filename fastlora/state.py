"""Save and load adapters as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora._adapter_check import PREFIX, AdapterCheck, tensor_slots
from fastlora._adapter_config import AdapterConfig, build_config
from fastlora._adapter_file import read_adapter, write_adapter
from fastlora._modules import (
    clean_name,
    lora_layers,
    lora_parameters,
    named_modules,
    plain_tensor,
    require_lora_layers,
    unwrap,
)
from fastlora.inject import Model, check_unadapted, inject, logger
from fastlora.nn import LoRAModule

_PEFT_APPLIES_TWICE = (
    "This adapter was saved by PEFT and covers nn.MultiheadAttention. PEFT up to 0.21.2 adds the update of "
    "out_proj twice (huggingface/peft#3774), fastlora once as defined; if it was trained with such a "
    "version, double every attention's out_proj.lora_B to get the outputs it had there."
)


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's LoRA layers, and what else of it trains, as a PEFT adapter folder.

    ``PeftModel.from_pretrained(base_model, path)`` and :func:`load_adapter` read it. Modules that train whole
    go into ``modules_to_save``. Both files are written completely before an older adapter is replaced. A
    merged model is saved like an unmerged one. In an ``nn.MultiheadAttention``, PEFT applies no dropout, and
    up to 0.21.2 it adds ``out_proj``'s update twice (huggingface/peft#3774).

    Args:
        model: An adapted model; not changed. Sharded (FSDP2) parameters are gathered, on every rank.
        path: The folder, made if missing.

    Returns:
        The folder.

    Raises:
        ValueError: No LoRA layers, only some with ``rslora``, or a trainable parameter that PEFT's format
            can't hold because its module contains LoRA layers.
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
    layers = require_lora_layers(root)
    if "" in layers:
        raise ValueError(
            f"expected a model around its layers, got a bare {type(root).__name__}; "
            "put it into nn.Sequential, say, so that it has a name"
        )
    whole = _whole_modules(root)
    names = named_modules(root)
    origin = getattr(root, "name_or_path", None)
    config = build_config(layers, names, whole, origin if isinstance(origin, str) else None)
    tensors = {
        key: plain_tensor(owner.get_parameter(part))
        for name, layer in layers.items()
        for key, owner, part in tensor_slots(name, layer)
    }
    for name in whole:
        for key, tensor in names[name].state_dict().items():
            tensors[f"{PREFIX}{name}.{clean_name(key)}"] = plain_tensor(tensor)
    folder = Path(path)
    write_adapter(folder, tensors, config)
    return folder


def load_adapter(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load a PEFT or fastlora adapter folder into a model, in place.

    A model without LoRA gets layers as the files describe them, trainable, the rest frozen; A and B become
    float32 beside 16-bit weights, else the weight's dtype. In an adapted model the files must hold exactly
    its layers, which are unmerged, take alpha and rslora from the file and keep their dropout. Nothing is
    unpickled, and every key, shape, dtype and setting is checked before anything changes. A PEFT adapter for
    ``nn.MultiheadAttention`` is logged as a warning: PEFT up to 0.21.2 adds ``out_proj``'s update twice
    (huggingface/peft#3774), we add it once.

    Args:
        model: The frozen model the adapter was trained on, or an adapted one.
        path: The folder.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: No such folder, or a file is missing in it.
        NotADirectoryError: ``path`` is a file.
        ValueError: Damaged files, a pickle, a kind of adapter we do not have, or one for another model (the
            first few differences are listed).

    Example:
        >>> import tempfile
        >>> from fastlora import apply_lora
        >>> path = save_adapter(apply_lora(nn.Sequential(nn.Linear(4, 2)), rank=1), tempfile.mkdtemp())
        >>> load_adapter(nn.Sequential(nn.Linear(4, 2)), path)[0].lora_A.shape
        torch.Size([1, 4])
    """
    root = unwrap(model)
    folder = Path(path)
    tensors, config = read_adapter(folder)
    targets: Mapping[str, nn.Module] = lora_layers(root)
    fresh = not targets
    check = AdapterCheck(root, tensors)
    if fresh:
        check_unadapted(root)
        targets = check.targets()
    check.layers(targets, config)
    whole = check.whole_modules(config.modules_to_save)
    check.finish(folder)
    if fresh:
        plan = {module: config.settings(name) for name, module in targets.items()}
        inject(root, plan, list(whole.values()))
    names = named_modules(root)
    layers = {name: names[name] for name in targets}
    _fill(layers, whole, tensors, config)
    if config.by_peft and any(isinstance(layer, nn.MultiheadAttention) for layer in layers.values()):
        logger.warning(_PEFT_APPLIES_TWICE)
    return model


@torch.no_grad()
def _fill(
    layers: Mapping[str, nn.Module],
    whole: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
) -> None:
    for name, layer in layers.items():
        settings = config.settings(name)
        for key, owner, part in tensor_slots(name, layer):
            assert isinstance(owner, LoRAModule)
            owner.unmerge()
            owner.get_parameter(part).copy_(tensors[key])
            owner.alpha, owner.rslora = settings.alpha, settings.rslora
    for name, module in whole.items():
        for key, tensor in module.state_dict().items():
            tensor.copy_(tensors[f"{PREFIX}{name}.{clean_name(key)}"])


def _whole_modules(model: nn.Module) -> list[str]:
    """Names of the modules that own trainable parameters other than A and B."""
    ours = set(map(id, lora_parameters(model)))
    owners = {
        clean_name(name).rpartition(".")[0]: clean_name(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in ours
    }
    layers = lora_layers(model)
    for owner, parameter_name in owners.items():
        if any(f"{layer}.".startswith(f"{owner}." if owner else "") for layer in layers):
            raise ValueError(
                f"expected trainable parameters in modules without LoRA layers, got {parameter_name!r}; "
                "PEFT's format saves whole modules only: freeze it, or move it into a module of its own"
            )
    return [o for o in owners if not any(o.startswith(f"{other}.") for other in owners)]
