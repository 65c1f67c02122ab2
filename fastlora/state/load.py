"""Read adapter folders into a model, also beside the adapters that it has."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora._core.log import logger
from fastlora.anatomy.names import (
    Added,
    Model,
    adapted_modules,
    added,
    clean_name,
    lora_layers,
    named_modules,
    unwrap,
)
from fastlora.anatomy.targets import why_uncalled
from fastlora.anatomy.tied import any_tied, shared_parameters, untie
from fastlora.anatomy.uncalled import bypassed
from fastlora.inject.adapters import add_adapters
from fastlora.inject.lora import add_lora, check_unadapted
from fastlora.inject.named import (
    adapter_names,
    all_layers,
    check_name,
    delete_adapter,
    put_in,
    set_adapter,
)
from fastlora.inject.prompts import add_prompts
from fastlora.inject.trained import train_only_tuners, trained_whole
from fastlora.nn import LoRALayer, LoRAModule
from fastlora.nn.lora.shelf import Shelf
from fastlora.nn.settings import LoRASettings
from fastlora.ops.weights.repacking import keep_as_stored
from fastlora.state.check import AdapterCheck
from fastlora.state.folder import AdapterFile, read_adapter
from fastlora.state.keys import (
    PREFIX,
    adapter_key,
    file_dtype,
    fill_alpha,
    fill_part,
    in_model_names,
    prompt_key,
    tensor_slots,
)
from fastlora.state.peft_config import AdapterConfig

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


def load_adapter(model: Model, path: str | os.PathLike[str], *, adapter_name: str | None = None) -> Model:
    """Load a PEFT or fastlora adapter folder into a model, in place.

    A model without LoRA, adapters or prompts gets them as the files describe them, trainable and in their
    dtype, the rest frozen. In an adapted model the files must hold exactly its layers and prompts, which are
    unmerged, take alpha, rslora and fixed scales from the file and keep their dropout and dtype. Nothing is
    unpickled, and every key, shape, dtype and setting is checked before anything changes.

    Of PEFT's files, frozen embeddings (of a vocabulary that was resized) are taken over, and modules that it
    trained apart from those that they are tied to are untied, with ``tie_word_embeddings`` in the model's
    config. Kinds of LoRA that we do not have (PiSSA, trained biases or tokens, …) are refused. An adapter for
    ``nn.MultiheadAttention`` is logged as a warning: PEFT up to 0.21.2 adds ``out_proj``'s update twice
    (huggingface/peft#3774), we add it once.

    Args:
        model: The frozen model the adapter was trained on, or an adapted one.
        path: The folder.
        adapter_name: In a model without LoRA, what its adapter is called. In one with LoRA, the adapter to
            load into: a new one beside those that are there, or one of these; which one is active stays as
            it was. None loads into the active one.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: No such folder, or a file is missing in it.
        NotADirectoryError: ``path`` is a file.
        TypeError: ``adapter_name`` is no text.
        ValueError: Damaged files, a pickle, a kind of adapter we do not have, or one for another model (the
            first few differences are listed).

    Example:
        >>> import tempfile
        >>> from fastlora import apply_lora, save_adapter
        >>> path = save_adapter(apply_lora(nn.Sequential(nn.Linear(4, 2)), rank=1), tempfile.mkdtemp())
        >>> load_adapter(nn.Sequential(nn.Linear(4, 2)), path)[0].lora_A.shape
        torch.Size([1, 4])
    """
    if adapter_name is None:
        return load_into_active(model, path)
    check_name(adapter_name)
    if not lora_layers(unwrap(model)):
        load_into_active(model, path)
        for layer in all_layers(model):
            Shelf(layer).active = adapter_name
        return model
    active, known = adapter_names(model)[0], adapter_names(model)
    if adapter_name not in known:
        settings = _settings_of_layers(unwrap(model), Path(path))
        put_in(model, adapter_name, settings.__getitem__)
    set_adapter(model, adapter_name)
    try:
        load_into_active(model, path)
    except Exception:
        set_adapter(model, active)
        if adapter_name not in known:
            delete_adapter(model, adapter_name)
        raise
    return set_adapter(model, active)


def load_into_active(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load an adapter folder into a model, or into its active adapter.

    Args:
        model: The frozen model the adapter was trained on, or an adapted one.
        path: The folder.

    Returns:
        The same model.

    Raises:
        OSError: No such folder, or a file is missing in it.
        ValueError: It can't be read, or does not fit the model.
    """
    root = unwrap(model)
    file, here = in_model_names(root, read_adapter(Path(path))), added(root)
    if not here:
        check_unadapted(root)
    check = AdapterCheck(root, here, file)
    targets = check.layers()
    check.places()
    check.prompts()
    whole = check.whole_modules(_kept_tied(root, file))
    apart = check.untied(whole)
    copies = check.base_copies()
    check.finish()
    _warn_of_uncalled(root, targets, file.folder)
    lora = file.config.lora
    if lora is not None and lora.weight_tying and any_tied(targets.values()):
        logger.warning(_TRAINS_APART, file.folder)
    keep_as_stored(root)
    _take_base(copies, file.folder)
    untie(root, apart)
    if not here:
        here = _build(root, targets, file, list(whole.values()))
    _fill(root, here, targets, whole, file)
    return model


def _settings_of_layers(model: nn.Module, folder: Path) -> dict[LoRAModule, LoRASettings]:
    """What the file says of every LoRA layer; an attention's counts for its ``out_proj`` too."""
    file, here = in_model_names(model, read_adapter(folder)), added(model)
    config = file.config
    whole = AdapterCheck(model, here, file).whole_modules()
    if config.lora is None or config.bottleneck or config.prompts or whole:
        raise ValueError(
            f"expected LoRA alone for a further adapter, got {folder} with bottleneck adapters, prompts or "
            "modules_to_save, of which a model has one set; load it into a model of its own"
        )
    trained = trained_whole(model, here) if config.by_peft else []
    if trained:
        raise ValueError(
            f"expected a model whose modules are as {folder} was trained with, got one that trains "
            f"{trained[0]!r} whole, which PEFT would switch with the adapter; load it into a model of its own"
        )
    return {
        inner: _file_layer(name, layer, file)
        for name, layer in here.layers.items()
        for inner in layer.modules()
        if isinstance(inner, LoRAModule)
    }


def _kept_tied(model: nn.Module, file: AdapterFile) -> set[str]:
    """Modules that PEFT trained as one with those in modules_to_save, which its config does not name."""
    if file.config.lora is None or not file.config.lora.weight_tying:
        return set()
    named = file.config.modules_to_save
    groups = [{holder.owner for holder in holders} for holders in shared_parameters(model)]
    tied = [owners for owners in groups if any(owner.endswith(named) for owner in owners)]
    return {owner for owner in set().union(*tied) if f"{PREFIX}{owner}.weight" in file.tensors}


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


def _build(
    model: nn.Module, targets: Mapping[str, nn.Module], file: AdapterFile, whole: list[nn.Module]
) -> Added:
    """Put in what a file holds, with values to be filled in."""
    if file.config.lora is not None:
        add_lora(model, {module: _file_layer(name, module, file) for name, module in targets.items()})
    add_adapters(model, file.config.bottleneck, adapter_dtype=None)
    for name, place in adapted_modules(model).items():
        keys = [adapter_key(name, part) for part in place.adapter.adapter_params()]
        place.adapter.to(file_dtype(file.tensors, keys))
    add_prompts(named_modules(model), file.config.prompts)
    train_only_tuners(model, whole)
    return added(model)


def _file_layer(name: str, layer: nn.Module, file: AdapterFile) -> LoRASettings:
    """What a file with LoRA says of one layer, in the dtype that its tensors have there."""
    assert file.config.lora is not None
    settings = file.config.lora.settings(name)
    keys = [key for key, _, _ in tensor_slots(name, layer, dora=settings.dora) if key in file.tensors]
    return replace(settings, adapter_dtype=file_dtype(file.tensors, keys) if keys else None)


@torch.no_grad()
def _fill(
    model: nn.Module,
    here: Added,
    targets: Iterable[str],
    whole: Mapping[str, nn.Module],
    file: AdapterFile,
) -> None:
    """Give everything that a file holds its values."""
    if file.config.lora is not None:
        # by every name that a file may have for a layer
        names = named_modules(model)
        _fill_lora({name: names[name] for name in targets}, file.tensors, file.config.lora)
    for name, place in file.config.bottleneck.items():
        adapter = here.places[name].adapter
        for part in adapter.adapter_params():
            adapter.get_parameter(part).copy_(file.tensors[adapter_key(name, part)])
        if isinstance(place.settings.scale, float):
            adapter.scale = place.settings.scale
    for name, prompts in here.prompts.items():
        prompts.tokens.copy_(file.tensors[prompt_key(name)])
    for name, module in whole.items():
        for key, tensor in module.state_dict().items():
            tensor.copy_(file.tensors[f"{PREFIX}{name}.{clean_name(key)}"])


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
