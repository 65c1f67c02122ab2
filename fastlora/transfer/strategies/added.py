"""Strategies that freeze the model and train what they add, and its new head."""

import re
from collections.abc import Collection

from torch import nn

from fastlora.inject.adapters import apply_adapters
from fastlora.inject.lora import apply_lora, cannot_carry
from fastlora.inject.prompts import apply_prompts

_CARRIERS = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)


def lora(
    model: nn.Module,
    head: str | None,
    *,
    train_batch_norm: bool = False,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    target_modules: str | Collection[str] | None = None,
) -> None:
    """LoRA on layers of a frozen model; its new head trains whole.

    Args:
        model: The model, changed in place.
        head: Name of its new head; None for a model that keeps the head it has.
        train_batch_norm: Must be False: the adapter's file would not hold the statistics that moved.
        rank: Rank of every update.
        alpha: Updates are scaled by ``alpha / rank``, or ``alpha / √rank`` with ``rslora``.
        dropout: Probability in [0, 1] of zeroing an element of an update's input while training.
        rslora: Scale by the square root of the rank.
        dora: Train the magnitude of every weight's rows too; see :func:`fastlora.apply_lora`.
        target_modules: Names, as :func:`fastlora.apply_lora` takes them. None stands for every linear layer
            and attention; in a network of convolutions, where these hold most of the weights, for every plain
            convolution too. Depthwise and grouped ones stay as they are: few weights are in them, and their
            updates could not be merged. So do those with a forward of their own, such as timm's
            ``Conv2dSame``.

    Raises:
        ValueError: ``train_batch_norm``, an option out of range, or no layer that can carry LoRA.
        TypeError: Named layers that can't carry it.
    """
    _no_batch_norm("lora", train_batch_norm)
    apply_lora(
        model,
        target_modules=_targets(model, head) if target_modules is None else target_modules,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        dora=dora,
        modules_to_save=_whole(head),
    )


def adapter(
    model: nn.Module,
    head: str | None,
    *,
    train_batch_norm: bool = False,
    adapter_size: int = 64,
    dropout: float = 0.0,
) -> None:
    """Bottleneck adapters after attention and MLP of a frozen model; its new head trains whole.

    Args:
        model: A transformer, changed in place.
        head: Name of its new head; None for a model that keeps the head it has.
        train_batch_norm: Must be False: the adapters' file would not hold the statistics that moved.
        adapter_size: Width of every bottleneck.
        dropout: Probability in [0, 1] of zeroing an element after an adapter's activation while training.

    Raises:
        ValueError: ``train_batch_norm``, an option out of range, or no transformer block that is known.
    """
    _no_batch_norm("adapter", train_batch_norm)
    apply_adapters(model, adapter_size=adapter_size, dropout=dropout, modules_to_save=_whole(head))


def prompt(
    model: nn.Module,
    head: str | None,
    *,
    train_batch_norm: bool = False,
    num_tokens: int = 10,
    deep: bool = True,
) -> None:
    """Learned tokens before the first block of a frozen model, or every block; its new head trains whole.

    Args:
        model: A transformer, changed in place.
        head: Name of its new head; None for a model that keeps the head it has.
        train_batch_norm: Must be False: the prompts' file would not hold the statistics that moved.
        num_tokens: Number of tokens, in every block if ``deep``.
        deep: Whether every block has tokens of its own; not for text models.

    Raises:
        ValueError: ``train_batch_norm``, or an option out of range.
        TypeError: A model that takes no prompts.
    """
    _no_batch_norm("prompt", train_batch_norm)
    apply_prompts(model, num_tokens=num_tokens, deep=deep, modules_to_save=_whole(head))


def _no_batch_norm(strategy: str, train_batch_norm: bool) -> None:
    if train_batch_norm:
        raise ValueError(
            f"expected train_batch_norm=False for strategy {strategy!r}, got True; "
            "its file would not hold the statistics that moved"
        )


def _whole(head: str | None) -> list[str] | None:
    return None if head is None else [head]


def _targets(model: nn.Module, head: str | None) -> str:
    classifier = set() if head is None else set(model.get_submodule(head).parameters())
    body = sum(p.numel() for p in model.parameters() if p not in classifier)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _CARRIERS) and name != head}
    convolutions = sum(m.weight.numel() for m in layers.values() if isinstance(m, nn.Conv2d))
    if 2 * convolutions < body:
        return "all-linear"
    attentions = [f"{name}." for name, m in layers.items() if isinstance(m, nn.MultiheadAttention)]
    chosen = [
        re.escape(name)
        for name, layer in layers.items()
        if not (isinstance(layer, nn.Conv2d) and layer.groups > 1)
        and not name.startswith(tuple(attentions))
        and cannot_carry(layer) is None
    ]
    if not chosen:
        raise ValueError(
            f"expected a plain convolution or linear layer beside the head to adapt, got none in "
            f"{type(model).__name__}; choose another strategy"
        )
    # as a regular expression it means whole names only
    return "|".join(chosen)
