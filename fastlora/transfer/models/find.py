"""Pretrained image classifiers with a new head, by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models

from fastlora._core.words import did_you_mean
from fastlora.anatomy.stages import head as find_head
from fastlora.transfer.models.backbones import dinov2_vits14
from fastlora.transfer.models.efficientnet import efficientnet_lite0
from fastlora.transfer.models.freezing import keep_frozen_in_eval
from fastlora.transfer.models.heads import deepen_head
from fastlora.transfer.models.names import (
    DINOV2,
    EFFICIENTNET_LITE0,
    PACKAGED,
    TIMM_PREFIX,
    check_name,
    timm_of,
)
from fastlora.transfer.models.weights import download, load_weights

# losses through these heads are rarely wanted any more, and only their train mode has them
_WITH_AUXILIARY_HEADS = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


def find_model(
    name: str, weights: str | Path | None, *, hidden: int | None = None, **options: Any
) -> Callable[[int], tuple[nn.Module, str]]:
    """Look a pretrained classifier up by its name, without making it.

    Args:
        name: A model that :func:`fastlora.create_transfer_model` knows.
        weights: ``"DEFAULT"``, the name of others of its weights, a file of a ``state_dict``, or None for
            random ones.
        hidden: Width of a hidden layer in the new head; None for a linear one.
        **options: ``image_size`` of dinov2_vits14.

    Returns:
        What makes it for a number of classes, in train mode and with everything trainable. It returns the
        model, whose frozen parts will stay in eval mode, and the name of its new head.

    Raises:
        ValueError: There is no such model, or it has no such weights; near names are listed.
        TypeError: Weights that are neither a name nor a path, or an option that the model doesn't have.
        ImportError: The library that has the model is not installed.
    """
    make = _maker(name, weights, options)

    def made(num_classes: int) -> tuple[nn.Module, str]:
        model = keep_frozen_in_eval(make(num_classes)).train()
        return model, find_head(model)[0] if hidden is None else deepen_head(model, hidden)

    return made


def _maker(name: str, weights: str | Path | None, options: dict[str, Any]) -> Callable[[int], nn.Module]:
    if options and name != DINOV2:
        raise TypeError(f"expected image_size for {DINOV2} only, got it for {name!r}; leave it out")
    check_name(name)
    if name in PACKAGED and weights != "DEFAULT":
        raise ValueError(f'expected weights="DEFAULT" for {name}, got {weights!r}; it has no others')
    if name == DINOV2:
        return partial(dinov2_vits14, options.get("image_size", 224))
    if name == EFFICIENTNET_LITE0:
        return lambda num_classes: _with_new_head(efficientnet_lite0(), num_classes, None)
    build, members = _timms(name) if name.startswith(TIMM_PREFIX) else _torchvisions(name)
    named = isinstance(weights, str) and weights in members
    if not named:
        _check_local(name, weights, members)

    def make(num_classes: int) -> nn.Module:
        model = download(name, lambda: build(weights)) if named else build(None)
        return _with_new_head(model, num_classes, weights)

    return make


def _torchvisions(name: str) -> tuple[Callable[[Any], nn.Module], list[str]]:
    """What builds a model of torchvision with weights of a name or None, and the names it takes."""

    def build(weights: Any) -> nn.Module:
        # aux_logits as with weights; initial values only matter where no file replaces them
        settings = {"init_weights": True} if weights is None and name in _WITH_AUXILIARY_HEADS else {}
        model: nn.Module = models.get_model(name, weights=weights, **settings)
        for auxiliary in _WITH_AUXILIARY_HEADS.get(name, ()):
            setattr(model, auxiliary, None)
            model.aux_logits = False  # type: ignore[assignment]
        return model

    return build, ["DEFAULT", *models.get_model_weights(name).__members__]


def _timms(name: str) -> tuple[Callable[[Any], nn.Module], list[str]]:
    """What builds a model of timm with weights of a name or None, and the names it takes."""
    timm, own = timm_of(name)
    return lambda weights: timm.create_model(own, pretrained=weights is not None), ["DEFAULT"]


def _check_local(name: str, weights: str | Path | None, members: list[str]) -> None:
    if weights is not None and not isinstance(weights, str | Path):
        raise TypeError(f"expected weights as a name, a path or None, got {type(weights).__name__}")
    if isinstance(weights, str) and not Path(weights).suffix:
        advice = did_you_mean(weights, members)
        raise ValueError(
            f"{advice}expected weights of {name} as one of {', '.join(members)}, the path of a .safetensors "
            f"or .pt file, or None, got {weights!r}"
        )


def _with_new_head(model: nn.Module, num_classes: int, weights: str | Path | None) -> nn.Module:
    """Read a file of weights, if one is given, and put in a new head."""
    head, layer = find_head(model)
    if weights is not None and Path(weights).suffix:
        load_weights(model, Path(weights), head)
    model.set_submodule(head, _new_head(layer, num_classes))
    if hasattr(model, "num_classes"):
        model.num_classes = num_classes  # type: ignore[assignment]
    return model


def _new_head(layer: nn.Module, num_classes: int) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None)
    # SqueezeNet classifies each pixel, then averages
    assert isinstance(layer, nn.Conv2d)
    return nn.Conv2d(layer.in_channels, num_classes, layer.kernel_size)  # type: ignore[arg-type]
