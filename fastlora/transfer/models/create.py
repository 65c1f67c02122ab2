"""Pretrained image classifiers with a new head, ready to train by a strategy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models

from fastlora._core.extras import require
from fastlora._core.option_checks import check_flag
from fastlora._core.words import did_you_mean
from fastlora.anatomy.stages import head as find_head
from fastlora.transfer.models.backbones import dinov2_vits14
from fastlora.transfer.models.efficientnet import efficientnet_lite0
from fastlora.transfer.models.freezing import keep_frozen_in_eval
from fastlora.transfer.models.names import DINOV2, EFFICIENTNET_LITE0, TIMM_PREFIX
from fastlora.transfer.models.weights import download, load_weights
from fastlora.transfer.models.wrapper import check_num_classes
from fastlora.transfer.strategies import find_strategy

# losses through these heads are rarely wanted any more, and only their train mode has them
_WITH_AUXILIARY_HEADS = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


def create_transfer_model(
    pretrained_name: str,
    num_classes: int,
    strategy: str = "feature_extraction",
    *,
    weights: str | Path | None = "DEFAULT",
    train_batch_norm: bool | None = None,
    **options: Any,
) -> nn.Module:
    """A pretrained classifier with a new head, in which only what the strategy names trains.

    Frozen parts stay in eval mode through ``model.train()``, so running statistics never move. The model is
    the library's own, with its names: a ResNet's head is ``model.fc``.

    Args:
        pretrained_name: A classification model of torchvision (``"resnet50"``, ``"vit_b_16"``, …), ``timm:``
            and a name of timm's, or ``"dinov2_vits14"`` and ``"efficientnet_lite0"``, whose weights come with
            the extra ``demo``.
        num_classes: Outputs of the new head, at least 2.
        strategy: ``"feature_extraction"`` (the head), ``"fine_tuning"`` (last stage and head), ``"full"``,
            ``"gradual"`` and ``"lp_ft"`` (both begin with the head), ``"lora"``, ``"adapter"``, ``"prompt"``.
        weights: ``"DEFAULT"`` for the library's best, the name of others of its weights
            (``"IMAGENET1K_V1"``), a ``.safetensors`` or ``.pt`` file of a ``state_dict`` (whatever its head),
            or None for random ones.
        train_batch_norm: Train BatchNorm layers in frozen stages too. None means False, but for ``"full"``.
        **options: Of the strategy: ``num_stages`` of fine_tuning; ``rank``, ``alpha``, ``dropout``,
            ``target_modules`` of lora; ``adapter_size``, ``dropout`` of adapter; ``num_tokens``, ``deep`` of
            prompt; and ``image_size`` of dinov2_vits14 (a multiple of 14, default 224).

    Raises:
        ValueError: An unknown model or strategy (near names are listed) or weights, weights of another
            architecture, fewer than 2 classes, or a strategy that the model can't have.
        TypeError: An option that the strategy doesn't have.
        FileNotFoundError: There is no such file of weights.
        DownloadError: Weights couldn't be fetched; says how to go on without a network.
        ImportError: The library that has the model is not installed.

    Example:
        >>> model = create_transfer_model("resnet18", 5, strategy="fine_tuning", weights=None)
        >>> sorted({name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad})
        ['fc', 'layer4']
    """
    check_num_classes(num_classes)
    if train_batch_norm is not None:
        check_flag("train_batch_norm", train_batch_norm, "None decides by the strategy")
    chosen = find_strategy(strategy)
    own = {"image_size": options.pop("image_size")} if "image_size" in options else {}
    chosen.check_options(options)
    make = _maker(pretrained_name, num_classes, weights, own)
    model = keep_frozen_in_eval(make())
    head, _ = find_head(model)
    if train_batch_norm is not None:
        options["train_batch_norm"] = train_batch_norm
    chosen.apply(model, head, **options)
    return model.train()


def check_model(name: str, weights: str | Path | None) -> None:
    """Refuse a model that :func:`create_transfer_model` doesn't know, without making one.

    Raises:
        ValueError: There is no such model; near names are listed.
    """
    _maker(name, 2, weights, {})


def _maker(
    name: str, num_classes: int, weights: str | Path | None, options: dict[str, Any]
) -> Callable[[], nn.Module]:
    if name == DINOV2:
        return lambda: _dinov2(num_classes, weights, **options)
    if options:
        raise TypeError(f"expected image_size for {DINOV2} only, got it for {name!r}; leave it out")
    if name == EFFICIENTNET_LITE0:
        _check_packaged(name, weights)
        return lambda: _finish(efficientnet_lite0(), num_classes, None)
    if str(name).startswith(TIMM_PREFIX):
        return lambda: _timm(name, num_classes, weights)
    known = models.list_models(module=models)
    if name not in known:
        names = [*known, DINOV2, EFFICIENTNET_LITE0]
        advice = did_you_mean(str(name).lower(), names, count=4, cutoff=0.4)
        raise ValueError(
            f"{advice}expected a classification model of torchvision, {DINOV2}, {EFFICIENTNET_LITE0} "
            f"or {TIMM_PREFIX}NAME, got {name!r}"
        )
    return lambda: _torchvision(name, num_classes, weights)


def _torchvision(name: str, num_classes: int, weights: str | Path | None) -> nn.Module:
    enum = models.get_model_weights(name)
    if isinstance(weights, str) and weights in ("DEFAULT", *enum.__members__):
        model: nn.Module = download(name, lambda: models.get_model(name, weights=weights))
    else:
        _check_local(name, weights, ["DEFAULT", *enum.__members__])
        # aux_logits as with weights; initial values only matter where no file replaces them
        settings = {"init_weights": True} if name in _WITH_AUXILIARY_HEADS else {}
        model = models.get_model(name, weights=None, **settings)
    for auxiliary in _WITH_AUXILIARY_HEADS.get(name, ()):
        setattr(model, auxiliary, None)
        model.aux_logits = False  # type: ignore[assignment]
    return _finish(model, num_classes, weights)


def _timm(name: str, num_classes: int, weights: str | Path | None) -> nn.Module:
    timm = require("timm", distribution="timm", purpose=f"the model {name}", extra="timm")
    own = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(own):
        names = [TIMM_PREFIX + each for each in timm.list_models()]
        advice = did_you_mean(name, names, count=4, cutoff=0.4)
        raise ValueError(f"{advice}expected the name of a model of timm, got {own!r}")
    if weights == "DEFAULT":
        model = download(name, lambda: timm.create_model(own, pretrained=True))
    else:
        _check_local(name, weights, ["DEFAULT"])
        model = timm.create_model(own, pretrained=False)
    return _finish(model, num_classes, weights)


def _dinov2(num_classes: int, weights: str | Path | None, image_size: int = 224) -> nn.Module:
    _check_packaged(DINOV2, weights)
    model: nn.Module = dinov2_vits14(image_size, num_classes)
    return model


def _check_packaged(name: str, weights: str | Path | None) -> None:
    if weights != "DEFAULT":
        raise ValueError(f'expected weights="DEFAULT" for {name}, got {weights!r}; it has no others')


def _check_local(name: str, weights: str | Path | None, members: list[str]) -> None:
    if weights is not None and not isinstance(weights, str | Path):
        raise TypeError(f"expected weights as a name, a path or None, got {type(weights).__name__}")
    named = isinstance(weights, str) and not Path(weights).suffix
    if named:
        advice = did_you_mean(weights, members)
        raise ValueError(
            f"{advice}expected weights of {name} as one of {', '.join(members)}, the path of a .safetensors "
            f"or .pt file, or None, got {weights!r}"
        )


def _finish(model: nn.Module, num_classes: int, weights: str | Path | None) -> nn.Module:
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
