"""Transformer blocks, known by their structure, and how wide what a module returns is."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fastlora.nn import LoRALayer
from fastlora.nn.adapted import AdapterPlacement

# what torchvision, timm and Hugging Face call a block's attention, beside a module called mlp
_ATTENTIONS = ("self_attention", "self_attn", "attn", "attention")
_CROSS_ATTENTIONS = ("crossattention", "cross_attn")
# a learned factor behind attention and MLP that starts near zero; an adapter before it would not be heard
_LAYER_SCALES = (("ls1", "ls2"), ("layer_scale1", "layer_scale2"))
_BERT_PARTS = (
    "attention.output.dense", "attention.output.dropout", "attention.output.LayerNorm",
    "intermediate.dense", "output.dense", "output.dropout", "output.LayerNorm",
)  # fmt: skip
# their output is as wide as their input
_WIDTH_KEEPING = (nn.Dropout, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class Block:
    """Where adapters go in one transformer block; every name is that of a module in the model.

    Attributes:
        attentions: The last module of the attention's branch before the residual is added; a decoder's block
            has a branch of cross-attention too.
        mlp: The last module of the MLP's branch before the residual is added.
        beside_mlp: Where an adapter reads what the MLP reads, and how it does so; None if nowhere.
        modules: The block's attention and MLP, which are as wide as the block.
        hidden_size: The block's width; None if no norm tells.
    """

    attentions: tuple[str, ...]
    mlp: str
    beside_mlp: tuple[str, AdapterPlacement] | None
    modules: tuple[str, ...]
    hidden_size: int | None


def find_blocks(names: Mapping[str, nn.Module]) -> list[Block]:
    """The transformer blocks of a model, from all its modules by name."""
    # a block shared by two names is one block
    found: dict[int, Block] = {}
    for name, module in names.items():
        block = _torch_block(name, module, names) or _bert_block(name, names) or _block(name, names)
        if block is not None:
            found.setdefault(id(names[block.mlp]), block)
    return list(found.values())


def output_sizes(names: Mapping[str, nn.Module]) -> dict[str, int]:
    """The size of the last dimension of what a module returns, for every module where it is certain."""
    sizes: dict[str, int] = {}
    for block in find_blocks(names):
        parts = {*block.attentions, block.mlp, *block.modules}
        parts |= {block.beside_mlp[0]} if block.beside_mlp else set()
        sizes |= dict.fromkeys(parts, block.hidden_size) if block.hidden_size else {}
    return sizes | {name: size for name, module in names.items() if (size := _output_size(module))}


def _torch_block(name: str, module: nn.Module, names: Mapping[str, nn.Module]) -> Block | None:
    if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return None
    # one dropout for every branch, the MLP's last. the MLP is no module, so nothing can run beside it
    count = 3 if isinstance(module, nn.TransformerDecoderLayer) else 2
    *attentions, mlp = (_join(name, f"dropout{i + 1}") for i in range(count))
    modules = (_join(name, part) for part in ("self_attn", "multihead_attn")[: count - 1])
    return Block(tuple(attentions), mlp, None, tuple(modules), _norm_size(names[_join(name, "norm1")]))


def _bert_block(name: str, names: Mapping[str, nn.Module]) -> Block | None:
    if not all(_join(name, part) in names for part in _BERT_PARTS):
        return None
    # output adds its second argument, the MLP's input, and normalises: before that, not after, is the place
    cross = _join(name, "crossattention.output.dropout")
    return Block(
        attentions=(_join(name, "attention.output.dropout"), *([cross] if cross in names else [])),
        mlp=_join(name, "output.dropout"),
        beside_mlp=(_join(name, "output"), "residual"),
        modules=(),
        hidden_size=_norm_size(names[_join(name, "output.LayerNorm")]),
    )


def _block(name: str, names: Mapping[str, nn.Module]) -> Block | None:
    attentions = [part for part in _ATTENTIONS if _join(name, part) in names]
    mlp = _join(name, "mlp")
    if len(attentions) != 1 or mlp not in names or _has_bare_scale(names[name]):
        return None
    attention = _join(name, attentions[0])
    cross = [_join(name, part) for part in _CROSS_ATTENTIONS if _join(name, part) in names]
    after_attention, after_mlp = attention, mlp
    for first, second in _LAYER_SCALES:
        if _scales(names, _join(name, first)) and _scales(names, _join(name, second)):
            after_attention, after_mlp = _join(name, first), _join(name, second)
    return Block(
        attentions=(after_attention, *cross),
        mlp=after_mlp,
        beside_mlp=(mlp, "parallel"),
        modules=(attention, mlp),
        hidden_size=_children_size(name, names),
    )


def _children_size(name: str, names: Mapping[str, nn.Module]) -> int | None:
    """The width of the norms that are a block's children; None where they differ, as it changes in it."""
    children = (_join(name, part) for part, _ in names[name].named_children())
    sizes = {size for child in children if child in names and (size := _norm_size(names[child]))}
    return sizes.pop() if len(sizes) == 1 else None


def _has_bare_scale(block: nn.Module) -> bool:
    # a layer scale that is a Parameter of the block: nothing can be put behind it
    return any("gamma" in name or "lambda" in name for name, _ in block.named_parameters(recurse=False))


def _scales(names: Mapping[str, nn.Module], name: str) -> bool:
    return name in names and not isinstance(names[name], nn.Identity)


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _norm_size(module: nn.Module) -> int | None:
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return int(module.normalized_shape[-1])
    # other people's RMSNorm; batch and group norms count channels, which need not come last
    weight = getattr(module, "weight", None)
    alike = "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
    channels = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    return weight.numel() if alike and not channels and isinstance(weight, Tensor) else None


def _output_size(module: nn.Module) -> int | None:
    if isinstance(module, LoRALayer):
        module = module.original_layer
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        sized = [child for child in module if not isinstance(child, _WIDTH_KEEPING)]
        return _output_size(sized[-1]) if sized else None
    return _norm_size(module)
