"""LoRA around a layer that stays an object of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nn.lora.base import LoRAModule
from fastlora.nn.lora.checks import check_wrappable
from fastlora.nn.lora.conv import check_groups, convolve
from fastlora.nn.lora.embedding import embed
from fastlora.nn.lora.linear import describe
from fastlora.nn.lora.quantised import share_linear
from fastlora.nn.lora.stored import stored_weight
from fastlora.nn.settings import LoRASettings
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.repacking import keep_as_stored


class LoRALayer(LoRAModule):
    """A layer kept whole as ``original_layer``, with a trainable low-rank update beside it.

    Computes what :class:`LoRALinear`, :class:`LoRAConv2d` or :class:`LoRAEmbedding` does. Choose it where the
    original module must stay an object of its own; ``remove_adapters`` gives exactly it back.

    Args:
        original_layer: An ``nn.Linear``, ``nn.Conv2d`` or ``nn.Embedding``; it is frozen, and its weight and
            bias stay in it.
        rank: Inner size of the update, at least 1.
        alpha: Strength of the update.
        dropout: Probability in [0, 1] of zeroing an element of the update's input while training; an
            embedding's has none.
        rslora: Scale by alpha/√rank instead of alpha/rank.
        dora: Keep a trained norm for every output feature (https://arxiv.org/abs/2402.09353).
        adapter_dtype: Dtype of A and B; None means float32 for a 16-bit weight, else the weight's dtype.

    Raises:
        TypeError: ``original_layer`` is no plain layer of these, or a setting has the wrong type.
        ValueError: A setting is out of range, a convolution's groups don't divide ``rank``, or the weight is
            on the meta device.

    Example:
        >>> layer = LoRALayer(nn.Linear(8, 4), rank=2)
        >>> layer(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """

    original_layer: nn.Linear | nn.Conv2d | nn.Embedding

    def __init__(
        self,
        original_layer: nn.Linear | nn.Conv2d | nn.Embedding,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        settings = LoRASettings(rank, alpha, dropout, rslora, adapter_dtype, dora)
        check_wrappable(original_layer)
        super().__init__()
        self.original_layer = original_layer
        self._add_lora(settings)
        keep_as_stored(original_layer)
        self.train(original_layer.training)

    @property
    def dropout(self) -> float:
        """Probability of zeroing an element of the update's input (:attr:`lora_dropout`)."""
        return self.lora_dropout

    def forward(self, input: Tensor) -> Tensor:
        """What the original layer takes, to what it gives."""
        layer = self.original_layer
        if isinstance(layer, nn.Conv2d):
            return convolve(self, layer, input)
        if isinstance(layer, nn.Embedding):
            return embed(self, layer, input)
        return self._linear(input, layer.bias)

    def check_mergeable(self, *, requantise: bool = False) -> None:
        """Refuse to merge into a convolution with groups.

        Args:
            requantise: Whether a quantised weight is to be quantised again.

        Raises:
            ValueError: There are groups, or the weight can't be quantised again.
        """
        if isinstance(self.original_layer, nn.Conv2d):
            check_groups(self.original_layer)
        super().check_mergeable(requantise=requantise)

    def to_base(self) -> nn.Linear | nn.Conv2d | nn.Embedding:
        """The original layer itself, with the update folded in if merged.

        A dense copy of a quantised one's weight is in a plain ``nn.Linear``, with the bias in its dtype.
        """
        layer = self.original_layer
        if self._copied and isinstance(layer, nn.Linear):
            return share_linear(nn.Linear, layer, cast=True)
        return layer

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return describe(self)

    def _stored(self) -> Tensor | FrozenWeight:
        layer = self.original_layer
        return stored_weight(layer) if isinstance(layer, nn.Linear) else layer.weight

    def _weight_owner(self) -> nn.Module:
        return self.original_layer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a plain layer's state dict knows nothing of the wrapper
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}original_layer.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)
