"""Pretrained image classifiers with a new head, ready to train by a strategy."""

from pathlib import Path
from typing import Any

from torch import nn

from fastlora._core.option_checks import check_flag
from fastlora.transfer.models.wrapper import check_num_classes
from fastlora.transfer.strategies import find_strategy


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
        **options: Options of the strategy: ``num_stages`` of fine_tuning; ``rank``, ``alpha``, ``dropout``,
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
    # the name can be imported where torchvision is not installed
    from fastlora.transfer.models.find import find_model

    model, head = find_model(pretrained_name, weights, **own)(num_classes)
    if train_batch_norm is not None:
        options["train_batch_norm"] = train_batch_norm
    chosen.apply(model, head, **options)
    return model.train()
