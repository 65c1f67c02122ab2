"""The eager definition of every op in plain PyTorch, for any floating dtype and device: the specification."""

import torch
from torch import Tensor
from torch.nn import functional as F


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = x·Wᵀ + bias + scaling · dropout(x)·Aᵀ·Bᵀ (Hu et al., https://arxiv.org/abs/2106.09685).

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, the frozen layer.
        bias: ``[out_features]`` or None.
        lora_A: ``[rank, in_features]``, in any floating dtype; rounded to x's.
        lora_B: ``[out_features, rank]``, likewise.
        scaling: Factor of the low-rank path, usually alpha / rank.
        dropout: Probability of zeroing an element of the low-rank path's input.
        training: Without it dropout does nothing.
        generator: Source of the dropout mask; torch's default generator without it.

    Returns:
        ``[..., out_features]``.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.eye(3)
        >>> lora_linear(x, weight, None, torch.ones(1, 3), torch.ones(3, 1), scaling=0.5)
        tensor([[2.5000, 2.5000, 2.5000],
                [2.5000, 2.5000, 2.5000]])
    """
    dropped = _dropout(x, dropout, generator) if training and dropout > 0 else x
    return _base_plus_low_rank(x, dropped, weight, bias, lora_A, lora_B, scaling)


def lora_linear_with_mask(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    keep_mask: Tensor,
    *,
    scaling: float,
    keep_probability: float,
) -> Tensor:
    """:func:`lora_linear` with the dropout mask given, so that implementations can be compared exactly.

    Args:
        keep_mask: bool, x's shape; True keeps an element and divides it by ``keep_probability``.
        keep_probability: Probability with which the mask was drawn.
    """
    dropped = x * keep_mask / keep_probability
    return _base_plus_low_rank(x, dropped, weight, bias, lora_A, lora_B, scaling)


def _base_plus_low_rank(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    low_rank = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * low_rank


def _dropout(x: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return F.dropout(x, probability)
    keep = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
    return x * keep / (1 - probability)
