"""Put bottleneck adapters into a model."""

from collections.abc import Collection
from typing import Literal, TypeVar

import torch

from fastlora._core.option_checks import check_count
from fastlora.anatomy.all_linear import tell_frozen_head
from fastlora.anatomy.names import unwrap
from fastlora.anatomy.targets import select_targets
from fastlora.inject.lora import Model
from fastlora.inject.places import (
    BLOCK_STYLES,
    NAMED_STYLES,
    add_adapters,
    check_no_adapters,
    check_whole,
    choose_blocks,
    plan_places,
)
from fastlora.inject.trained import train_only_tuners
from fastlora.nn.adapted import AdapterPlacement
from fastlora.nn.settings import AdapterSettings, LayerNormPlace, Scale, check_dtype
from fastlora.reference import Activation

Placement = Literal["houlsby", "pfeiffer", "parallel", "sequential"]
Style = TypeVar("Style", bound=str)


def apply_adapters(
    model: Model,
    *,
    adapter_size: int | None = None,
    placement: Placement | None = None,
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    modules_to_save: Collection[str] | None = None,
    hidden_size: int | None = None,
    reduction_factor: int | None = None,
    activation: Activation = "gelu",
    layer_norm: LayerNormPlace | None = None,
    scale: Scale = 1.0,
    dropout: float = 0.0,
    bias: bool = True,
    adapter_dtype: torch.dtype | None = None,
) -> Model:
    """Put bottleneck adapters into a model and freeze the rest.

    Changes the model in place; its output stays that of the frozen model, bit for bit, until training moves
    W_up away from zero. Modules with an adapter keep their names in the state dict, so checkpoints of the
    plain model still load, and ``apply_lora`` may come before or after. What changed is logged at INFO on the
    logger ``fastlora`` and told by :func:`fastlora.adapter_summary`.

    Args:
        model: A model with transformer blocks that are known by their structure (torch's encoder and decoder
            layers, torchvision's and timm's ViT and Swin, Hugging Face's BERT, ViT,
            LLaMA and their like), or any model with ``target_modules``.
        adapter_size: Width of every bottleneck; None means 64, or what ``reduction_factor`` says.
        placement: In blocks: ``"houlsby"`` (the default), after attention and after the MLP
            (https://arxiv.org/abs/1902.00751); ``"pfeiffer"``, after the MLP
            (https://arxiv.org/abs/2005.00247); ``"parallel"``, beside the MLP
            (https://arxiv.org/abs/2110.04366). All lie before the residual is added and behind a layer scale,
            except that ``"parallel"`` lies before it. At ``target_modules``: ``"sequential"`` (the default),
            the module's output goes through the adapter; ``"parallel"``, the module's input goes through it
            and is added to the output.
        target_modules: A list of names, each the whole name of a module or the end of it, or a regular
            expression for whole names, as in :func:`fastlora.apply_lora`. Any module that returns a tensor
            ``[..., hidden_size]``, or a tuple that starts with one. None takes the blocks.
        exclude_modules: Names or a regular expression to leave out, with all that is in them.
        modules_to_save: Names of modules to train whole, a new classification head, say, or the layer norms
            as in Houlsby's paper; never adapted.
        hidden_size: Width of what is adapted, for modules that do not tell it.
        reduction_factor: Makes every bottleneck ``hidden_size // reduction_factor`` wide instead.
        activation: As in :class:`fastlora.AdapterLayer`, like the rest.
        layer_norm: Before W_down or after W_up.
        scale: Factor of the adapter's part.
        dropout: After the activation.
        bias: Of both projections.
        adapter_dtype: Of the adapters; None means float32 beside 16-bit weights, else the weights' dtype.

    Returns:
        The same model.

    Raises:
        TypeError: A wrong argument type.
        ValueError: A model without known blocks, a name that matches nothing, a module that can't have an
            adapter, is never called or does not tell its width (all are listed), a setting out of range, or a
            model that has adapters already. The model is unchanged after any error.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)
        >>> model = apply_adapters(model, adapter_size=4, modules_to_save=["head"])
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 2 × (2·8·4 + 8 + 4) and the head
        179
    """
    settings = AdapterSettings(adapter_size, reduction_factor, activation, layer_norm, scale, dropout, bias)
    check_dtype("adapter_dtype", adapter_dtype)
    if hidden_size is not None:
        hidden_size = check_count("hidden_size", hidden_size, "give the width of what is adapted")
    root = unwrap(model)
    check_no_adapters(root)
    chosen: dict[str, AdapterPlacement]
    if target_modules is None:
        style = _style(placement, BLOCK_STYLES, "without target_modules")
        chosen, whole = choose_blocks(root, style, exclude_modules, modules_to_save)
    else:
        named: AdapterPlacement = _style(placement, NAMED_STYLES, "with target_modules")
        modules, whole = select_targets(root, target_modules, exclude_modules, modules_to_save)
        chosen = dict.fromkeys(modules, named)
    check_whole(root, whole)
    add_adapters(root, plan_places(root, chosen, settings, hidden_size), adapter_dtype)
    train_only_tuners(root, whole)
    tell_frozen_head(root)
    return model


def _style(placement: str | None, accepted: tuple[Style, ...], when: str) -> Style:
    if placement is None:
        return accepted[0]
    for style in accepted:
        if style == placement:
            return style
    raise ValueError(
        f"expected placement to be {', '.join(map(repr, accepted))} {when}, got {placement!r}; "
        "use one of these"
    )
