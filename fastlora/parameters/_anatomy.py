"""Head, last stage and attention of a model, recognised by its structure."""

from torch import nn

from fastlora.nn import LoRAModule

_HEAD_NAMES = ("heads", "head", "fc", "classifier")
# as the libraries call separate projections of query and value
_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"))
# a stem of two convolutions is no stage; smaller stacks than this share of the parameters don't count
_SMALLEST_STACK = 0.05
_PACKED = ("qkv", "query_key_value", "c_attn")


def head(model: nn.Module) -> tuple[str, nn.Module]:
    """The last layer, which maps features to classes or words, and its name.

    Raises:
        ValueError: There is none under a usual name.
    """
    # timm's and Hugging Face's ways to ask
    for ask in ("get_classifier", "get_output_embeddings"):
        asked = getattr(model, ask, lambda: None)()
        if isinstance(asked, nn.Module) and _own_leaves(asked):
            return _last_leaf(_name_of(model, asked), asked)
    for name in _HEAD_NAMES:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module) and _own_leaves(module):
            return _last_leaf(name, module)
    raise ValueError(
        f"expected a head called {', '.join(_HEAD_NAMES)}, got {type(model).__name__} without one; "
        "use parameter_report on a model prepared by hand"
    )


def last_stage(model: nn.Module) -> tuple[str, nn.Module]:
    """The last block of a model that is one stack of alike blocks, the last stage of one with several stacks.

    Raises:
        ValueError: There are no stacks.
    """
    stacks: dict[str, nn.Module] = {}
    smallest = _SMALLEST_STACK * _count(model)
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if not inside and _is_stack(module) and _count(module) >= smallest:
            stacks[name] = module
    if not stacks:
        raise ValueError(
            f"expected blocks of one kind in a row, got {type(model).__name__} without any; "
            "use parameter_report on a model prepared by hand"
        )
    name, stack = list(stacks.items())[-1]
    if len(stacks) > 1:
        return name, stack
    child, block = list(stack.named_children())[-1]
    return f"{name}.{child}", block


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


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    alike = len({type(child) for child in children}) == 1 and len(children) > 1
    return alike and isinstance(module, nn.Sequential | nn.ModuleList) and all(map(_count, children))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _own_leaves(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if m._parameters and not list(m.children())]


def _last_leaf(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    leaf = _own_leaves(module)[-1]
    return f"{name}.{leaf}" if leaf else name, module.get_submodule(leaf)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(wanted)]
