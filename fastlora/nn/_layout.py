"""Where A and B of an update stand beside each kind of layer: PEFT's names and shapes."""

from torch import nn

Shape = tuple[int, ...]


def lora_parts(layer: nn.Module, rank: int) -> dict[str, Shape]:
    """Name and shape of A and of B, in this order, for a plain layer or a LoRA layer that is one.

    Example:
        >>> lora_parts(nn.Conv2d(3, 8, 5, padding=2), rank=4)
        {'lora_A': (4, 3, 5, 5), 'lora_B': (8, 4, 1, 1)}
        >>> lora_parts(nn.Embedding(10, 6), rank=2)
        {'lora_embedding_A': (2, 10), 'lora_embedding_B': (6, 2)}
    """
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


def rank_misfit(layer: nn.Module, rank: int) -> str | None:
    """Why this layer can't carry an update of this rank, or None if it can."""
    if isinstance(layer, nn.Conv2d) and rank % layer.groups:
        return (
            f"expected a rank that the convolution's groups={layer.groups} divide, as in PEFT, got {rank}; "
            "use another rank, or leave this layer out"
        )
    return None


def check_rank(layer: nn.Module, rank: int) -> None:
    """Refuse a rank that this layer can't carry.

    Raises:
        ValueError: See :func:`rank_misfit`.
    """
    misfit = rank_misfit(layer, rank)
    if misfit is not None:
        raise ValueError(misfit)
