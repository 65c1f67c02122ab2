"""The layers that an initialisation is for."""

from collections.abc import Iterable

from torch import nn

from fastlora.anatomy.names import clean_name, require_lora_layers
from fastlora.nn import LoRAModule


def linear_layers(model: nn.Module) -> dict[str, LoRAModule]:
    """Every LoRA layer beside a linear weight by name, an attention's and its ``out_proj`` apart.

    Raises:
        ValueError: There are no LoRA layers, or none of this kind.
    """
    require_lora_layers(model)
    found = {clean_name(name): m for name, m in model.named_modules() if isinstance(m, LoRAModule)}
    linear = {name: layer for name, layer in found.items() if not _is_other(layer)}
    if not linear:
        raise ValueError(
            f"expected LoRA on linear layers or attention, got it on {_kinds(found.values())} alone; these "
            "begin with A random and B zero"
        )
    return linear


def check_unmerged(name: str, layer: LoRAModule) -> None:
    """Refuse a layer whose update is folded in.

    Raises:
        ValueError: It is.
    """
    if layer.merged:
        raise ValueError(
            f"{name or type(layer).__name__}: expected an unmerged layer, got a merged one; call "
            "fastlora.unmerge_adapters first"
        )


def _is_other(layer: LoRAModule) -> bool:
    return isinstance(layer._weight_owner(), nn.Conv2d | nn.Embedding)


def _kinds(layers: Iterable[LoRAModule]) -> str:
    return ", ".join(sorted({type(layer).__name__ for layer in layers}))
