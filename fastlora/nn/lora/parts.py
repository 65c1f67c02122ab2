"""The parts of an update beside each kind of layer: PEFT's names and shapes, dtypes and first values."""

import math

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


MAGNITUDE = "lora_magnitude_vector"


def lora_parts(layer: nn.Module, rank: int, *, dora: bool = False) -> dict[str, Shape]:
    """Name and shape of A, of B and of DoRA's magnitude, in this order.

    Args:
        layer: A plain layer or a LoRA layer that is one.
        rank: Of the update.
        dora: Whether there is a magnitude.

    Example:
        >>> lora_parts(nn.Conv2d(3, 8, 5, padding=2), rank=4)
        {'lora_A': (4, 3, 5, 5), 'lora_B': (8, 4, 1, 1)}
        >>> lora_parts(nn.Embedding(10, 6), rank=2)
        {'lora_embedding_A': (2, 10), 'lora_embedding_B': (6, 2)}
        >>> lora_parts(nn.Linear(3, 8), rank=2, dora=True)
        {'lora_A': (2, 3), 'lora_B': (8, 2), 'lora_magnitude_vector': (8,)}
    """
    parts = _factor_parts(layer, rank)
    return parts | {MAGNITUDE: magnitude_shape(layer)} if dora else parts


def adapter_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """What A and B have where nobody says: float32 beside a 16-bit weight."""
    return torch.float32 if weight_dtype.itemsize < 4 else weight_dtype


def draw_update(lora_A: Tensor, lora_B: Tensor, *, embedding: bool) -> None:
    """First values of A and B, whose product is zero; of an embedding it is A that is zero."""
    if embedding:
        nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)


def magnitude_shape(layer: nn.Module) -> Shape:
    """One number for every output feature, in the shape that PEFT gives it."""
    if isinstance(layer, nn.Embedding):
        return (layer.embedding_dim,)
    if isinstance(layer, nn.Conv2d):
        return (1, layer.out_channels, 1, 1)
    assert isinstance(layer, nn.Linear)
    return (layer.out_features,)


def _factor_parts(layer: nn.Module, rank: int) -> dict[str, Shape]:
    if isinstance(layer, nn.Embedding):
        return {
            "lora_embedding_A": (rank, layer.num_embeddings),
            "lora_embedding_B": (layer.embedding_dim, rank),
        }
    if isinstance(layer, nn.Conv2d):
        # A sees every input channel, whatever the groups; only B is grouped
        return {
            "lora_A": (rank, layer.in_channels, *layer.kernel_size),
            "lora_B": (layer.out_channels, rank // layer.groups, 1, 1),
        }
    if isinstance(layer, nn.MultiheadAttention):
        return {"lora_A": (rank, layer.embed_dim), "lora_B": (3 * layer.embed_dim, rank)}
    assert isinstance(layer, nn.Linear)
    return {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}


def misfit(layer: nn.Module, rank: int, *, dora: bool) -> str | None:
    """Why this layer can't carry an update of this rank and kind, or None if it can."""
    if isinstance(layer, nn.Conv2d) and rank % layer.groups:
        return (
            f"expected a rank that the convolution's groups={layer.groups} divide, as in PEFT, got {rank}; "
            "use another rank, or leave this layer out"
        )
    if dora and isinstance(layer, nn.MultiheadAttention):
        return (
            "expected a layer that can carry DoRA, got nn.MultiheadAttention, for which PEFT has none "
            "either; leave it out, or use dora=False"
        )
    if dora and isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return (
            f"expected a convolution without groups for DoRA, got groups={layer.groups}: its update does not "
            "fit into the weight whose norm DoRA takes; leave it out, or use dora=False"
        )
    return None


def check_fit(layer: nn.Module, rank: int, *, dora: bool) -> None:
    """Refuse an update that this layer can't carry.

    Raises:
        ValueError: See :func:`misfit`.
    """
    problem = misfit(layer, rank, dora=dora)
    if problem is not None:
        raise ValueError(problem)
