"""Put LoRA layers into a model by name, fold them in, and take them out again."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from fastlora._core.option_checks import check_flag
from fastlora._core.words import first_few
from fastlora.anatomy.all_linear import tell_frozen_head
from fastlora.anatomy.names import (
    Model,
    added,
    named_modules,
    replace_modules,
    require_lora_layers,
    unwrap,
)
from fastlora.anatomy.targets import ALL_LINEAR, select_targets
from fastlora.inject.merged_config import forget_merged
from fastlora.inject.merging import merged_apart
from fastlora.inject.prompts import follow_blocks
from fastlora.inject.trained import forget_tuners, train_only_tuners
from fastlora.nn import (
    AdaptedModule,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    LoRAModule,
    LoRAMultiheadAttention,
)
from fastlora.nn.lora.checks import check_carrier
from fastlora.nn.lora.layout import fitted, layout_of
from fastlora.nn.settings import LoRASettings
from fastlora.ops.weights.repacking import keep_as_stored
from fastlora.together.model import follow_layers
from fastlora.together.parts import LayerOfParts

# what can carry LoRA, and how the LoRA layer is made of it
_MAKERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: LoRALinear.from_linear,
    nn.MultiheadAttention: LoRAMultiheadAttention.from_attention,
    nn.Conv2d: LoRAConv2d.from_conv,
    nn.Embedding: LoRAEmbedding.from_embedding,
}


def apply_lora(
    model: Model,
    *,
    target_modules: str | Collection[str] = ALL_LINEAR,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    exclude_modules: str | Collection[str] | None = None,
    modules_to_save: Collection[str] | None = None,
    rslora: bool = False,
    dora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    one_mask: bool = False,
) -> Model:
    """Replace layers of a model by LoRA layers (https://arxiv.org/abs/2106.09685) and freeze the rest.

    Changes the model in place; its output stays what it was until training moves B away from zero. Weights
    are shared with the layers replaced, not copied. Hooks on replaced layers are not carried over. What
    changed is logged at INFO on the logger ``fastlora`` and told by :func:`fastlora.adapter_summary`. From
    then on ``save_pretrained`` of a Hugging Face model writes every update into its weight, for
    ``from_pretrained``, with A and B beside it, for a training that goes on.

    Linear layers that their module's forward calls with one variable (query, key and value; gate and up) and
    MLPs compute together, as :func:`fastlora.accelerate` tells: on a CPU outputs are the same bits, x is kept
    and its gradient summed once, half of an MLP's activations kept or less. Where one of them has dropout,
    the first one's call draws the masks of all. They have one backward pass: gradients of one output after
    the other need ``retain_graph=True``. A layer computes alone if it or one of them has hooks (a global one
    counts), DoRA, parametrizations, a class with a forward of its own, or a start to subtract
    (:func:`fastlora.init.pissa_`, ``olora_``) beside dropout, or is merged. In compiled graphs layers that
    share their input compute alone, and MLPs as here.

    Args:
        model: Any model with ``nn.Linear``, ``nn.MultiheadAttention``, ``nn.Conv2d`` or ``nn.Embedding``.
        target_modules: A list of names, each the whole name of a module or the end of it (``"query"`` means
            every ``….query``); or a regular expression for whole names; or ``"all-linear"`` for every
            ``nn.Linear`` and ``nn.MultiheadAttention`` except what ``model.get_output_embeddings()`` returns
            and the head of a classifier of Hugging Face, timm or torchvision. That head is trained whole, as
            PEFT does it for a classification task; ``exclude_modules`` leaves it frozen. Where nothing else
            is linear, and in other models, a head is a linear layer like all. What else ``"all-linear"`` does
            not reach (convolutions, the experts of a mixture kept in one tensor) is logged as a warning. An
            attention includes its ``out_proj``; convolutions and embeddings are adapted where they are named,
            never by ``"all-linear"``. Layers whose weights the model reads without calling them
            (torchvision's Swin, see the warning logged) can't carry LoRA: ``"all-linear"`` leaves them out.
        rank: Inner size of every update.
        alpha: Strength of every update.
        dropout: Probability in [0, 1] of zeroing an element of an update's input while training; an
            embedding's update has none.
        exclude_modules: Names or a regular expression to leave out of the targets.
        modules_to_save: Names of modules to train whole, a new classification head, say; never adapted.
            Bottleneck adapters in the model, and what was named when they were put in, go on training.
        rslora: Scale by alpha/√rank instead of alpha/rank.
        dora: Keep a trained norm for every output feature (DoRA, https://arxiv.org/abs/2402.09353); not for
            ``nn.MultiheadAttention`` and convolutions with groups.
        adapter_dtype: Dtype of A and B; None means float32 for 16-bit weights, else the weights' dtype.
        one_mask: Let linear layers that share their input drop the same elements of it, with one mask for
            all. Layers that compute alone, as in compiled graphs, have masks of their own. It is no part of
            saved files; :func:`fastlora.load_adapter` leaves it as it is in an adapted model.

    Returns:
        The same model.

    Raises:
        TypeError: A module that matches but can't carry LoRA, a convolution whose groups do not divide
            ``rank`` included (all are listed), or a wrong argument type.
        ValueError: A name that matches nothing (near matches are listed), a layer that the model never
            calls, a setting out of range, a model already adapted, or a model that itself is the layer. The
            model is unchanged after any error.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)
        >>> model = apply_lora(model, target_modules=["self_attention", "mlp.0"], modules_to_save=["head"])
        >>> sum(p.requires_grad for p in model.parameters())
        8
    """
    settings = LoRASettings(rank, alpha, dropout, rslora, adapter_dtype, dora)
    check_flag("one_mask", one_mask)
    root = unwrap(model)
    check_unadapted(root)
    chosen, whole = select_targets(root, target_modules, exclude_modules, modules_to_save)
    check_carriers(chosen, settings)
    keep_as_stored(root)
    add_lora(root, {module: settings for module in chosen.values()}, one_mask=one_mask)
    train_only_tuners(root, whole)
    if exclude_modules is None:
        tell_frozen_head(root)
    return model


def remove_adapters(model: Model) -> Model:
    """Take every LoRA layer and bottleneck adapter out.

    A LoRA layer is replaced by a plain one that shares its weight as it is now: after :func:`merge_adapters`
    this is PEFT's ``merge_and_unload``, otherwise its ``unload``. A module with a bottleneck adapter stands
    where it stood before, the same object. Parameters stay frozen; hooks on replaced layers are not carried
    over. The config of a Hugging Face model forgets quantised weights that were merged into dense copies.

    Args:
        model: An adapted model, changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: The model has neither, or is itself one.

    Example:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 2)), rank=1)
        >>> remove_adapters(model)
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    root = unwrap(model)
    here = added(root)
    if not here.layers and not here.places:
        require_lora_layers(root)
    if isinstance(root, LoRAModule | AdaptedModule):
        original = "original_module" if isinstance(root, AdaptedModule) else "to_base()"
        raise ValueError(
            f"expected a model around its layers, got a bare {type(root).__name__}; use its .{original}"
        )
    config: Any = getattr(root, "config", None)
    if getattr(config, "tie_word_embeddings", False) and merged_apart(root):
        # or from_pretrained would tie what no longer is
        config.tie_word_embeddings = False
    forget_merged(root)
    replace_modules(root, {layer: layer.to_base() for layer in here.layers.values()})
    originals: dict[nn.Module, nn.Module] = {place: place.original_module for place in here.places.values()}
    replace_modules(root, originals)
    follow_blocks(root, originals)
    follow_layers(root)
    forget_tuners(root)
    return model


def check_unadapted(model: nn.Module) -> None:
    """Refuse a model that carries LoRA already, or is itself the layer to replace.

    Raises:
        ValueError: Either of these.
    """
    adapted = [
        name or "the model itself"
        for name, module in named_modules(model).items()
        if isinstance(module, LoRAModule) or hasattr(module, "lora_A")
    ]
    if adapted:
        raise ValueError(
            f"expected a model without LoRA, got one adapted at {len(adapted)} places, {adapted[0]!r} first; "
            "take it out with fastlora.remove_adapters first (PEFT: unload or merge_and_unload)"
        )
    for kind, maker in _MAKERS.items():
        if isinstance(model, kind):
            raise ValueError(
                f"expected a model around its layers, got a bare {type(model).__name__}; "
                f"use fastlora.{maker.__qualname__}(layer)"
            )


def check_carriers(chosen: Mapping[str, nn.Module], settings: LoRASettings) -> None:
    """Refuse modules that can't carry LoRA of this rank and kind, all in one error.

    Raises:
        TypeError: At least one can't.
    """
    found = {
        name: cannot_carry(module) or layout_of(module).misfit(module, settings.rank, dora=settings.dora)
        for name, module in chosen.items()
    }
    problems = [f"{name}: {problem}" for name, problem in found.items() if problem]
    if problems:
        raise TypeError(
            f"expected only modules that can carry LoRA, got {len(problems)} that cannot; leave them out "
            "with exclude_modules or name the others:\n  " + "\n  ".join(first_few(problems, 5))
        )


def cannot_carry(module: nn.Module) -> str | None:
    """Why this module can't be replaced by a LoRA layer, or None if it can."""
    try:
        check_carrier(module)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def add_lora(model: nn.Module, plan: Mapping[nn.Module, LoRASettings], *, one_mask: bool = False) -> None:
    """Replace the plan's modules by LoRA layers; ``train_only_tuners`` decides what trains."""
    made = {module: _adapted(module, settings) for module, settings in plan.items()}
    for layer in made.values():
        if isinstance(layer, LayerOfParts):
            layer._ask_for_one_mask(asked=one_mask)
    replace_modules(model, made)
    follow_layers(model)


def _adapted(module: nn.Module, settings: LoRASettings) -> nn.Module:
    maker = next(maker for kind, maker in _MAKERS.items() if isinstance(module, kind))
    return maker(module, **vars(fitted(module, settings)))
