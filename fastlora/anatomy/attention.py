"""Head, last stage and attention of a model, recognised by its structure."""

from torch import nn

from fastlora.anatomy.stages import head, stages
from fastlora.nn import LoRAModule

# as the libraries call separate projections of query and value
_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"))
_PACKED = ("qkv", "query_key_value", "c_attn")


def last_stage(model: nn.Module) -> tuple[str, nn.Module]:
    """The layers before the head that are unfrozen first, and their name.

    Raises:
        ValueError: The model has no head, or nothing before it.
    """
    parts = stages(model, head(model)[1])
    if not parts:
        raise ValueError(f"expected layers before the head, got {type(model).__name__} without any")
    return parts[-1].name, nn.ModuleList(parts[-1].modules)


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """Every ``nn.Linear``."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def attention_targets(model: nn.Module, rank: int) -> tuple[list[str], str]:
    """What ``apply_lora`` has to adapt for query and value, and a remark where these can't be had alone.

    Raises:
        ValueError: The model has no attention that is recognised.
    """
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for pair in _QUERY_AND_VALUE:
        if ends.issuperset(pair):
            return list(pair), f"{pair[0]} and {pair[1]} only"
    packed = [name for name in _PACKED if name in ends]
    if packed:
        return packed, f"{packed[0]} packs q, k and v into one layer, so k is in it"
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    if attentions:
        alone = sum(2 * rank * (m.embed_dim + m.embed_dim) for m in attentions.values())
        return list(attentions), (
            "nn.MultiheadAttention packs q, k and v, so k and the output projection are in it; "
            f"q and v alone would be {alone:,} parameters"
        )
    raise ValueError(f"expected attention, got {type(model).__name__} without any that is recognised")


def trained_whole(module: nn.Module) -> int:
    """Scalars that train in a layer that is trained as it is, not adapted."""
    if isinstance(module, LoRAModule):
        return 0
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
