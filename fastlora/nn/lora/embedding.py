"""LoRA for ``nn.Embedding``: a drop-in layer in PEFT's layout."""

from typing import Self, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora._core.option_checks import check_flag
from fastlora.nn.lora.base import LoRAModule
from fastlora.nn.lora.checks import check_embedding
from fastlora.nn.lora.linear import describe
from fastlora.nn.settings import LoRAOptions, LoRASettings, lora_settings

Embedding = TypeVar("Embedding", bound=nn.Embedding)


class LoRAEmbedding(LoRAModule, nn.Embedding):
    """``nn.Embedding`` with a frozen weight and a trainable low-rank update (https://arxiv.org/abs/2106.09685).

    y = W[i] + scaling · Aᵀ[i]·Bᵀ, with scaling = alpha/rank. Other than in a linear layer, A starts at zero
    and B is random, as in PEFT and in LoRA's published code; so the first output equals the frozen layer's
    bit for bit. There is no dropout. ``padding_idx`` and ``scale_grad_by_freq`` act on A's columns as they do
    on the rows of a weight: that of ``padding_idx`` gets no gradient and stays zero. ``max_norm`` is not
    accepted, as it rewrites the frozen weight in every forward, nor is ``sparse``, as no sparse gradient
    reaches A through its transposition. A plain ``nn.Embedding`` state dict loads as it is.

    Args:
        num_embeddings: Number of rows of the weight, above every index.
        embedding_dim: Size of one row.
        padding_idx: Index of the row that never trains.
        scale_grad_by_freq: Divide gradients by how often their index occurs in the batch.
        rank: Inner size of the update, at least 1.
        alpha: Strength of the update.
        rslora: Scale by alpha/√rank instead (https://arxiv.org/abs/2312.03732).
        dora: Keep a trained norm for every output feature (https://arxiv.org/abs/2402.09353).
        device: Device of every parameter.
        dtype: Dtype of the weight.
        adapter_dtype: Dtype of A and B; None means float32 for a 16-bit weight, else the weight's dtype.

    Attributes:
        lora_embedding_A: ``[rank, num_embeddings]``, trainable, zero at the start.
        lora_embedding_B: ``[embedding_dim, rank]``, trainable.

    Raises:
        TypeError: ``rank`` is no integer, ``alpha`` no number, a dtype not floating.
        ValueError: ``rank`` < 1, ``alpha`` not finite.

    Example:
        >>> layer = LoRAEmbedding(10, 4, rank=2)
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_embedding_A', 'lora_embedding_B']
        >>> i = torch.tensor([[1, 2, 1]])
        >>> torch.equal(layer(i), layer.weight[i])
        True
    """

    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
        rank: int = 16,
        alpha: float = 32.0,
        rslora: bool = False,
        dora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        settings = LoRASettings(rank, alpha, rslora=rslora, adapter_dtype=adapter_dtype, dora=dora)
        check_flag("scale_grad_by_freq", scale_grad_by_freq)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            device=device,
            dtype=dtype,
        )
        self._add_lora(settings)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **options: Unpack[LoRAOptions]) -> Self:
        """A LoRA layer around the weight of ``embedding``, which is shared and frozen, not copied.

        Hooks are not carried over.

        Args:
            embedding: The layer to adapt, with weight ``[num_embeddings, embedding_dim]``; device and
                train/eval mode are kept.
            **options: ``rank`` (16), ``alpha`` (32.0), ``rslora`` (False), ``dora`` (False) and
                ``adapter_dtype`` (None), see :class:`fastlora.nn.settings.LoRAOptions`.

        Raises:
            TypeError: Not a plain ``nn.Embedding`` with a floating Parameter as weight, or an unknown option.
            ValueError: ``max_norm`` or ``sparse`` is set, the weight is on the meta device, a setting is out
                of range, or ``dropout`` is given.

        Example:
            >>> embedding = nn.Embedding(10, 4)
            >>> LoRAEmbedding.from_embedding(embedding, rank=2).weight is embedding.weight
            True
        """
        settings = lora_settings(**options)
        check_embedding(embedding)
        layer = _share_embedding(cls.__new__(cls), embedding)
        layer._add_lora(settings)
        return layer.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``[...]`` to ``[..., embedding_dim]``."""
        return embed(self, self, input)

    def reset_lora_parameters(self) -> None:
        """Start a fresh update: A zero, B from a standard normal distribution; a merged layer is unmerged.

        With A at zero, rows that no batch contains keep their values.
        """
        super().reset_lora_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as ``nn.Embedding`` does, and start a fresh update."""
        self.unmerge()
        super().reset_parameters()
        if "lora_embedding_A" in self._parameters:
            self.reset_lora_parameters()

    def to_base(self) -> nn.Embedding:
        """A plain ``nn.Embedding`` sharing this layer's weight (folded in if merged)."""
        return _share_embedding(nn.Embedding.__new__(nn.Embedding), self)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"{super().extra_repr()}, {describe(self)}"


def embed(layer: LoRAModule, embedding: nn.Embedding, indices: Tensor) -> Tensor:
    """The rows of ``embedding`` with the update of ``layer``, which is it or stands around it.

    Args:
        layer: Holds the update.
        embedding: Holds the weight.
        indices: ``[...]``.
    """
    out = nn.Embedding.forward(embedding, indices)
    if layer.merged:
        return out
    lora_A, lora_B = layer._pair()
    rows = F.embedding(
        indices, lora_A.T, embedding.padding_idx, scale_grad_by_freq=embedding.scale_grad_by_freq
    )
    # only the rows that were looked up are computed, so A and B need not be rounded to the weight's dtype
    updated = torch.add(out, F.linear(rows, lora_B), alpha=layer.scaling)
    return (updated * layer._output_factor() if layer.dora else updated).to(out.dtype)


def _share_embedding(target: Embedding, source: nn.Embedding) -> Embedding:
    nn.Embedding.__init__(
        target,
        source.num_embeddings,
        source.embedding_dim,
        source.padding_idx,
        scale_grad_by_freq=source.scale_grad_by_freq,
        device="meta",
    )
    target.weight = source.weight
    return target.train(source.training)
