"""How an update lies beside each kind of layer: PEFT's names and shapes, first values, and what can't be."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastlora.nn.lora.stored import is_dense
from fastlora.nn.settings import LoRASettings

Shape = tuple[int, ...]
MAGNITUDE = "lora_magnitude_vector"


class Layout:
    """The update beside an ``nn.Linear``, and what other kinds of layers have otherwise.

    Attributes:
        names: What A and B are called.
        zero: The one of them that is zero at the start, and so their product.
        drops: Whether elements of the update's input can be dropped.
        columns: Whether the output features are the columns of the frozen weight, not its rows.
    """

    names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    zero: ClassVar[str] = "lora_B"
    drops: ClassVar[bool] = True
    columns: ClassVar[bool] = False

    def shapes(self, layer: Any, rank: int) -> tuple[Shape, Shape]:
        """Shapes of A and B of this rank beside a plain layer."""
        return (rank, layer.in_features), (layer.out_features, rank)

    def magnitude_shape(self, layer: Any) -> Shape:
        """Shape of DoRA's magnitude: one number for every output feature of a plain layer."""
        return (layer.out_features,)

    def misfit(self, layer: Any, rank: int, *, dora: bool) -> str | None:
        """Why a plain layer can't carry an update of this rank and kind, or None if it can."""
        if dora and isinstance(layer, nn.Linear) and not is_dense(layer):
            return (
                "expected a dense weight for DoRA, whose norms it takes, got a quantised "
                f"{type(layer).__name__}; leave it out, or use dora=False"
            )
        return None

    def draw(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Set A and B to their first values, whose product is zero."""
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)

    def factors(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is the update of the weight, seen as ``[rows, everything else]``."""
        return lora_B.flatten(1), lora_A.flatten(1)


class _ConvLayout(Layout):
    def shapes(self, layer: Any, rank: int) -> tuple[Shape, Shape]:
        # A sees every input channel, whatever the groups; only B is grouped
        lora_A = (rank, layer.in_channels, *layer.kernel_size)
        return lora_A, (layer.out_channels, rank // layer.groups, 1, 1)

    def magnitude_shape(self, layer: Any) -> Shape:
        return (1, layer.out_channels, 1, 1)

    def misfit(self, layer: Any, rank: int, *, dora: bool) -> str | None:
        if rank % layer.groups:
            return (
                f"expected a rank that the convolution's groups={layer.groups} divide, as in PEFT, got "
                f"{rank}; use another rank, or leave this layer out"
            )
        if dora and layer.groups > 1:
            return (
                f"expected a convolution without groups for DoRA, got groups={layer.groups}: its update does "
                "not fit into the weight whose norm DoRA takes; leave it out, or use dora=False"
            )
        return None


class _EmbeddingLayout(Layout):
    names = ("lora_embedding_A", "lora_embedding_B")
    zero = "lora_embedding_A"
    drops = False
    columns = True

    def shapes(self, layer: Any, rank: int) -> tuple[Shape, Shape]:
        return (rank, layer.num_embeddings), (layer.embedding_dim, rank)

    def magnitude_shape(self, layer: Any) -> Shape:
        return (layer.embedding_dim,)

    def draw(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)

    def factors(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        return lora_A.T, lora_B.T


class _AttentionLayout(Layout):
    def shapes(self, layer: Any, rank: int) -> tuple[Shape, Shape]:
        return (rank, layer.embed_dim), (3 * layer.embed_dim, rank)

    def misfit(self, layer: Any, rank: int, *, dora: bool) -> str | None:
        return (
            (
                "expected a layer that can carry DoRA, got nn.MultiheadAttention, for which PEFT has none "
                "either; leave it out, or use dora=False"
            )
            if dora
            else None
        )


_LAYOUTS: tuple[tuple[type[nn.Module], Layout], ...] = (
    (nn.Linear, Layout()),
    (nn.MultiheadAttention, _AttentionLayout()),
    (nn.Conv2d, _ConvLayout()),
    (nn.Embedding, _EmbeddingLayout()),
)


def layout_of(layer: nn.Module) -> Layout:
    """How updates lie beside this kind of layer, plain or a LoRA layer that is one.

    Raises:
        TypeError: It can't carry LoRA.
    """
    for kind, layout in _LAYOUTS:
        if isinstance(layer, kind):
            return layout
    raise TypeError(f"expected a layer that can carry LoRA, got {type(layer).__name__}")


def lora_parts(layer: nn.Module, rank: int, *, dora: bool = False) -> dict[str, Shape]:
    """Name and shape of A, of B and of DoRA's magnitude, in this order.

    Args:
        layer: A plain layer or a LoRA layer that is one.
        rank: Inner size of the update.
        dora: Whether there is a magnitude.

    Example:
        >>> lora_parts(nn.Conv2d(3, 8, 5, padding=2), rank=4)
        {'lora_A': (4, 3, 5, 5), 'lora_B': (8, 4, 1, 1)}
        >>> lora_parts(nn.Embedding(10, 6), rank=2)
        {'lora_embedding_A': (2, 10), 'lora_embedding_B': (6, 2)}
        >>> lora_parts(nn.Linear(3, 8), rank=2, dora=True)
        {'lora_A': (2, 3), 'lora_B': (8, 2), 'lora_magnitude_vector': (8,)}
    """
    layout = layout_of(layer)
    parts = dict(zip(layout.names, layout.shapes(layer, rank), strict=True))
    return parts | {MAGNITUDE: layout.magnitude_shape(layer)} if dora else parts


def adapter_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """What A and B have where nobody says: float32 beside a 16-bit weight."""
    return torch.float32 if weight_dtype.itemsize < 4 else weight_dtype


def fitted(layer: nn.Module, settings: LoRASettings) -> LoRASettings:
    """What a layer takes of settings for many: no dropout where it has nothing to act on."""
    return settings if layout_of(layer).drops else replace(settings, dropout=0.0)


def check_fit(layer: nn.Module, settings: LoRASettings) -> None:
    """Refuse an update that a plain layer can't carry.

    Raises:
        ValueError: A convolution's groups don't divide the rank, there is no DoRA for the layer, or nothing
            that dropout could act on.
    """
    layout = layout_of(layer)
    problem = layout.misfit(layer, settings.rank, dora=settings.dora)
    if settings.dropout and not layout.drops:
        problem = f"expected no dropout for an nn.Embedding, got {settings.dropout}; leave it out"
    if problem is not None:
        raise ValueError(problem)
