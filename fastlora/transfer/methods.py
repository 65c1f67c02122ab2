"""The ways to train that the demo compares, each on the same pictures with the same seed."""

from collections.abc import Iterable

from torch import nn

from fastlora.inject.adapters import apply_adapters
from fastlora.inject.lora import apply_lora
from fastlora.inject.prompts import apply_prompts
from fastlora.transfer.fit import FitSettings
from fastlora.transfer.tuning import Tuning

METHODS = ("probe", "lora", "adapter", "prompts", "full")
DEFAULT_METHODS = ("probe", "lora")

FUSED = "LoRA, fused"

_HEAD = ["head"]


def choose_methods(names: Iterable[str]) -> tuple[str, ...]:
    """Look up methods by name.

    Args:
        names: Out of :data:`METHODS`; ``"all"`` stands for all of them.

    Returns:
        Those named, once each, in the order of :data:`METHODS`.

    Raises:
        ValueError: An unknown name, or none.

    Example:
        >>> choose_methods(["full", "probe"])
        ('probe', 'full')
        >>> choose_methods(["all"]) == METHODS
        True
    """
    given = list(names)
    unknown = [name for name in given if name not in (*METHODS, "all")]
    if unknown or not given:
        raise ValueError(
            f"expected methods out of {', '.join(METHODS)}, or all, got {unknown[0] if unknown else ''!r}; "
            "name one or more of them"
        )
    return tuple(name for name in METHODS if name in given or "all" in given)


def lora_tuning(fit: FitSettings, *, rank: int, alpha: float) -> Tuning:
    """LoRA on every linear layer of the backbone; ``alpha / rank`` is its strength."""

    def apply(model: nn.Module, rank: int, alpha: float) -> nn.Module:
        return apply_lora(model, rank=rank, alpha=alpha, modules_to_save=_HEAD)

    return Tuning("lora", FUSED, fit, {"rank": rank, "alpha": alpha}, apply, "adapter", fused=True)


def adapter_tuning(fit: FitSettings, *, adapter_size: int) -> Tuning:
    """A bottleneck adapter after the attention and after the MLP of every block."""

    def apply(model: nn.Module, adapter_size: int) -> nn.Module:
        return apply_adapters(model, adapter_size=adapter_size, modules_to_save=_HEAD)

    return Tuning(
        "adapters", "Adapters", fit, {"adapter_size": adapter_size}, apply, "bottleneck", fused=True
    )


def prompt_tuning(fit: FitSettings, *, num_tokens: int) -> Tuning:
    """Visual prompts: ``num_tokens`` learned tokens in every block."""

    def apply(model: nn.Module, num_tokens: int) -> nn.Module:
        return apply_prompts(model, num_tokens=num_tokens, deep=True, modules_to_save=_HEAD)

    return Tuning("deep_prompts", "Visual prompts", fit, {"num_tokens": num_tokens}, apply, "prompts")


def full_tuning(fit: FitSettings) -> Tuning:
    """Every parameter; nothing small to save."""

    def apply(model: nn.Module) -> nn.Module:
        return model.requires_grad_(True)

    return Tuning("full", "Full fine-tuning", fit, {}, apply)
