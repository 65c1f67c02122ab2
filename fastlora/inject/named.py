"""Add, choose and drop the named adapters of a model's LoRA layers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from fastlora._core.log import logger
from fastlora._core.words import did_you_mean
from fastlora.anatomy.names import Model, require_lora_layers, unwrap
from fastlora.nn import LoRAModule
from fastlora.nn.lora.checks import check_parameter
from fastlora.nn.lora.layout import check_fit, fitted
from fastlora.nn.lora.shelf import Shelf
from fastlora.nn.settings import LoRASettings


def adapter_names(model: nn.Module) -> list[str]:
    """Names of a model's adapters, the active one first; the first that a model gets is called "default".

    Raises:
        ValueError: The model has no LoRA layers.

    Example:
        >>> from fastlora import apply_lora
        >>> adapter_names(add_adapter(apply_lora(nn.Sequential(nn.Linear(4, 2))), "german", rank=4))
        ['default', 'german']
    """
    return list(dict.fromkeys(name for layer in all_layers(model) for name in Shelf(layer).names()))


def add_adapter(
    model: Model,
    adapter_name: str,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    rslora: bool | None = None,
    dora: bool | None = None,
) -> Model:
    """Put a fresh adapter beside those that every LoRA layer has; :func:`set_adapter` makes it active.

    The model is changed in place and computes what it did. Adapters that are not active are frozen and cost
    no time; they are part of the state dict. To be called before DDP or FSDP take the model.

    Args:
        model: A model with LoRA layers.
        adapter_name: Without a dot.
        rank: Inner size of the new updates; None takes each layer's active one, as for every option.
        alpha: Strength of the new updates.
        dropout: Probability in [0, 1] of zeroing an element of their input while training.
        rslora: Scale by alpha/√rank instead of alpha/rank.
        dora: Keep a trained norm for every output feature.

    Returns:
        The same model.

    Raises:
        TypeError: A wrong argument type.
        ValueError: The model has no LoRA layers, has an adapter of this name, or can't carry such a one.

    Example:
        >>> from fastlora import apply_lora
        >>> model = add_adapter(apply_lora(nn.Sequential(nn.Linear(4, 2))), "german", rank=4)
        >>> adapter_names(model)
        ['default', 'german']
    """
    given = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora, "dora": dora}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}

    put_in(model, adapter_name, lambda layer: replace(layer._settings(), **changes))
    return model


def set_adapter(model: Model, adapter_name: str) -> Model:
    """Let a model compute with this adapter; it trains if the one before did, and the others are frozen.

    Merged layers are unmerged first. An optimiser for the new one has to be made after this.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no LoRA layers, or no adapter of this name (near ones are suggested).

    Example:
        >>> from fastlora import apply_lora
        >>> model = add_adapter(apply_lora(nn.Sequential(nn.Linear(4, 2))), "german", rank=4)
        >>> adapter_names(set_adapter(model, "german"))
        ['german', 'default']
    """
    layers = all_layers(model)
    check_known(model, adapter_name)
    _check_unsharded(layers)
    for layer in layers:
        Shelf(layer).activate(adapter_name)
    return model


def delete_adapter(model: Model, adapter_name: str) -> Model:
    """Drop an adapter that is not the active one.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no such adapter, or computes with it.

    Example:
        >>> from fastlora import apply_lora
        >>> model = add_adapter(apply_lora(nn.Sequential(nn.Linear(4, 2))), "german", rank=4)
        >>> adapter_names(delete_adapter(model, "german"))
        ['default']
    """
    layers = all_layers(model)
    check_known(model, adapter_name)
    if adapter_name == Shelf(layers[0]).active:
        raise ValueError(
            f"expected an adapter that is not active, got {adapter_name!r}; choose another one with "
            "fastlora.set_adapter first, or take all of them out with fastlora.remove_adapters"
        )
    for layer in layers:
        Shelf(layer).remove(adapter_name)
    return model


def put_in(model: nn.Module, name: str, settings: Callable[[LoRAModule], LoRASettings]) -> None:
    """Put a fresh adapter beside the others of every layer, once all is checked."""
    layers = all_layers(model)
    _check_new(model, name)
    _check_unsharded(layers)
    wanted = [(layer, fitted(layer._weight_owner(), settings(layer))) for layer in layers]
    for layer, asked in wanted:
        check_fit(layer._weight_owner(), asked)
    for layer, asked in wanted:
        Shelf(layer).add(name, asked)
    logger.info("%s: adapters %s", type(unwrap(model)).__name__, ", ".join(adapter_names(model)))


def all_layers(model: nn.Module) -> list[LoRAModule]:
    """Every LoRA layer, an attention's ``out_proj`` before the attention.

    Raises:
        ValueError: There is none.
    """
    require_lora_layers(model)
    return [module for module in reversed(list(model.modules())) if isinstance(module, LoRAModule)]


def check_known(model: nn.Module, name: str) -> None:
    """Refuse a name that no adapter of the model has.

    Raises:
        ValueError: It has none.
    """
    known = adapter_names(model)
    if name not in known:
        raise ValueError(
            f"expected an adapter out of {', '.join(map(repr, known))}, got {name!r}; "
            f"{did_you_mean(name, known)}fastlora.add_adapter makes a new one"
        )


def check_name(name: object) -> None:
    """Refuse what can't be an adapter's name.

    Raises:
        TypeError: No text.
        ValueError: Empty, with a dot, or the name of a method of modules.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected adapter_name to be text, got {name!r}")
    # nn.Module keeps a child's name as an attribute
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"expected adapter_name without a dot and no method's name, got {name!r}")


def _check_new(model: nn.Module, name: str) -> None:
    check_name(name)
    if name in adapter_names(model):
        raise ValueError(
            f"expected the name of a new adapter, got {name!r}, which the model has; choose another, or drop "
            "that one with fastlora.delete_adapter"
        )


def _check_unsharded(layers: list[LoRAModule]) -> None:
    for layer in layers:
        for part in layer.adapter_params():
            check_parameter(f"{type(layer).__name__}.{part}", layer.get_parameter(part))
