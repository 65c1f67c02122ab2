"""Put bottleneck adapters into a model."""

from collections.abc import Collection, Mapping
from typing import Literal, cast

import torch
from torch import nn

from fastlora._core.option_checks import check_count, check_one_of
from fastlora._core.words import first_few
from fastlora.anatomy.all_linear import tell_frozen_head
from fastlora.anatomy.blocks import find_blocks, output_sizes
from fastlora.anatomy.names import (
    Model,
    adapted_modules,
    lora_layers,
    named_modules,
    replace_modules,
    unwrap,
)
from fastlora.anatomy.targets import left_out_names, select_targets
from fastlora.inject.places import Place
from fastlora.inject.prompts import follow_blocks
from fastlora.inject.trained import train_only_tuners
from fastlora.nn import AdaptedModule
from fastlora.nn.adapted import AdapterPlacement, check_wrappable
from fastlora.nn.settings import AdapterSettings, LayerNormPlace, Scale, check_dtype
from fastlora.ops.weights.repacking import keep_as_stored
from fastlora.reference import Activation

_BLOCK_STYLES = ("houlsby", "pfeiffer", "parallel")
_NAMED_STYLES: tuple[AdapterPlacement, ...] = ("sequential", "parallel")
Placement = Literal["houlsby", "pfeiffer", "parallel", "sequential"]


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
        activation: ``"gelu"`` (exact), ``"relu"`` or ``"silu"``.
        layer_norm: ``"pre"`` normalises what enters W_down, ``"post"`` what leaves W_up; None does neither.
        scale: Factor of the adapter's part; ``"learned"`` makes it a parameter that starts at 1.
        dropout: Probability in [0, 1] of zeroing an element after the activation while training.
        bias: Whether both projections have a bias.
        adapter_dtype: Dtype of the adapters; None means float32 beside 16-bit weights, else the weights'.

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
    _check_no_adapters(root)
    chosen: dict[str, AdapterPlacement]
    if target_modules is None:
        style = _BLOCK_STYLES[0] if placement is None else placement
        check_one_of("placement without target_modules", style, _BLOCK_STYLES)
        chosen, whole = _choose_blocks(root, style, exclude_modules, modules_to_save)
    else:
        named = _NAMED_STYLES[0] if placement is None else placement
        check_one_of("placement with target_modules", named, _NAMED_STYLES)
        modules, whole = select_targets(root, target_modules, exclude_modules, modules_to_save)
        chosen = dict.fromkeys(modules, cast(AdapterPlacement, named))
    _check_whole(root, whole)
    keep_as_stored(root)
    add_adapters(root, _plan_places(root, chosen, settings, hidden_size), adapter_dtype)
    train_only_tuners(root, whole)
    tell_frozen_head(root)
    return model


def _choose_blocks(
    model: nn.Module,
    style: str,
    exclude_modules: str | Collection[str] | None,
    modules_to_save: Collection[str] | None,
) -> tuple[dict[str, AdapterPlacement], list[nn.Module]]:
    """The places of a style in the transformer blocks of a model, and the modules to train whole.

    Raises:
        ValueError: No known block, a block without such a place, or none left.
    """
    names = named_modules(model)
    blocks = find_blocks(names)
    if not blocks:
        raise ValueError(
            f"expected transformer blocks of torch, torchvision, timm or Hugging Face, got "
            f"{type(model).__name__} with none that we know; say where adapters go with target_modules"
        )
    chosen: dict[str, AdapterPlacement] = {}
    for block in blocks:
        if style == "parallel" and block.beside_mlp is None:
            raise ValueError(
                "expected placement 'houlsby' or 'pfeiffer' for torch's own layers, got 'parallel'; their "
                "MLP is no module that an adapter could run beside"
            )
        if style == "parallel" and block.beside_mlp is not None:
            chosen |= dict([block.beside_mlp])
        else:
            spots = [*block.attentions, block.mlp] if style == "houlsby" else [block.mlp]
            chosen |= dict.fromkeys(spots, "sequential")
    left_out, whole = left_out_names(model, exclude_modules, modules_to_save)
    kept = {n: p for n, p in chosen.items() if not any(n == o or n.startswith(f"{o}.") for o in left_out)}
    if not kept:
        raise ValueError(
            f"expected at least one place for an adapter, got none: exclude_modules={exclude_modules!r} and "
            f"modules_to_save={modules_to_save!r} leave out all {len(chosen)}"
        )
    return kept, whole


def _plan_places(
    model: nn.Module,
    chosen: Mapping[str, AdapterPlacement],
    settings: AdapterSettings,
    hidden_size: int | None,
) -> dict[str, Place]:
    """Give every chosen place its width.

    Raises:
        ValueError: Modules that can't have an adapter, a width that we can't tell, or one that differs from
            the given; all are listed.
    """
    names, problems = named_modules(model), []
    sizes = output_sizes(names)
    places: dict[str, Place] = {}
    for name, placement in chosen.items():
        known = sizes.get(name)
        size = hidden_size or known
        problem = cannot_adapt(names[name])
        if problem is None and size is None:
            problem = f"{type(names[name]).__name__} does not say how wide its output is; give hidden_size"
        elif problem is None and known not in (None, size):
            problem = f"its output is {known} wide, not hidden_size={hidden_size}"
        if problem is None and size is not None:
            settings.size(size)
            places[name] = Place(placement, size, settings)
        else:
            problems.append(f"{name}: {problem}")
    if problems:
        raise ValueError(
            f"expected only modules that an adapter fits, got {len(problems)} others; leave them out with "
            "exclude_modules or name other ones:\n  " + "\n  ".join(first_few(problems, 5))
        )
    return places


def cannot_adapt(module: nn.Module) -> str | None:
    """Why this module can't have an adapter, or None if it can."""
    try:
        check_wrappable(module)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _check_no_adapters(model: nn.Module) -> None:
    """Refuse a model that has adapters already, or is itself one, or whose weights are sharded.

    Raises:
        TypeError: They are.
        ValueError: It has.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise TypeError(
                f"expected {name} to be a plain Parameter, got {type(parameter.data).__name__}; add adapters "
                "before sharding"
            )
    places = [name or "the model itself" for name in adapted_modules(model)]
    if places:
        raise ValueError(
            f"expected a model without bottleneck adapters, got {len(places)}, {places[0]!r} first; take "
            "them out with fastlora.remove_adapters first"
        )


def _check_whole(model: nn.Module, whole: Collection[nn.Module]) -> None:
    """Refuse to train a module whole whose weights LoRA layers hold frozen.

    Raises:
        ValueError: There is one.
    """
    ours = {id(layer): name for name, layer in lora_layers(model).items()}
    for module in whole:
        for part in module.modules():
            if id(part) in ours:
                raise ValueError(
                    f"expected modules_to_save without LoRA layers, got one with {ours[id(part)]!r} in it; "
                    "name it in modules_to_save of apply_lora instead"
                )


def add_adapters(model: nn.Module, places: Mapping[str, Place], adapter_dtype: torch.dtype | None) -> None:
    """Put an adapter at every place, all checked before; ``train_only_tuners`` decides what trains."""
    names = named_modules(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, place in places.items():
        device, dtype = _device_and_dtype(name, names)
        layer = place.make(device, adapter_dtype or dtype)
        # a module with two names gets one adapter
        replacements.setdefault(names[name], AdaptedModule(names[name], layer, place.placement))
    replace_modules(model, replacements)
    follow_blocks(model, replacements)


def _device_and_dtype(name: str, names: Mapping[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    # a dropout has no weights of its own: what is around it says where and in which precision it works
    while True:
        for parameter in names[name].parameters():
            # beside 16-bit and quantised weights adapters stay in float32
            wide = parameter.is_floating_point() and parameter.dtype.itemsize >= 4
            return parameter.device, parameter.dtype if wide else torch.float32
        if not name:
            return torch.get_default_device(), torch.get_default_dtype()
        name = name.rpartition(".")[0]
        while name not in names:
            name = name.rpartition(".")[0]
