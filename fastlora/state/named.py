"""Read adapter folders into a model, also beside the adapters that it has."""

import os
from pathlib import Path

from torch import nn

from fastlora.anatomy.names import lora_layers, unwrap
from fastlora.inject.lora import Model
from fastlora.inject.named import (
    adapter_names,
    all_layers,
    check_name,
    delete_adapter,
    put_in,
    set_adapter,
)
from fastlora.inject.whole_modules import trained_whole
from fastlora.nn import LoRAModule
from fastlora.nn.lora.shelf import Shelf
from fastlora.nn.settings import LoRASettings
from fastlora.state.folder import read_adapter
from fastlora.state.keys import in_model_names
from fastlora.state.save_load import file_layer, holds_whole, load_into_active


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
        adapter_name: Of the adapter in a model without LoRA. In one with LoRA, the adapter to load into: a
            new one beside those that are there, or one of these; which one is active stays as it was. None
            loads into the active one.

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
        settings = _settings(unwrap(model), Path(path))
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


def _settings(model: nn.Module, folder: Path) -> dict[LoRAModule, LoRASettings]:
    """What the file says of every LoRA layer; an attention's counts for its ``out_proj`` too."""
    tensors, config = in_model_names(model, *read_adapter(folder))
    if config.lora is None or config.bottleneck or config.prompts or holds_whole(model, tensors, config):
        raise ValueError(
            f"expected LoRA alone for a further adapter, got {folder} with bottleneck adapters, prompts or "
            "modules_to_save, of which a model has one set; load it into a model of its own"
        )
    whole = trained_whole(model) if config.lora.by_peft else []
    if whole:
        raise ValueError(
            f"expected a model whose modules are as {folder} was trained with, got one that trains "
            f"{whole[0]!r} whole, which PEFT would switch with the adapter; load it into a model of its own"
        )
    return {
        inner: file_layer(name, layer, tensors, config.lora)
        for name, layer in lora_layers(model).items()
        for inner in layer.modules()
        if isinstance(inner, LoRAModule)
    }
