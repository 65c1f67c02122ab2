"""Masks, shapes and the unfused product of multi-head attention, as ``nn.MultiheadAttention`` means them."""

import math

import torch
from torch import Tensor


def check_shapes(query: Tensor, key: Tensor, value: Tensor, *, embed_dim: int, batch_dim: int) -> None:
    """Refuse query, key and value that do not fit each other.

    Raises:
        ValueError: Not 2 or 3 dimensions, a wrong width or batch size, or key and value of different shapes.
    """
    if query.is_nested or query.dim() not in (2, 3) or key.dim() != query.dim():
        raise ValueError(
            f"expected query and key of 3 dimensions, or 2 without a batch, got {query.dim()} and "
            f"{key.dim()} (nested: {query.is_nested}); pad nested tensors first"
        )
    if key.shape != value.shape:
        raise ValueError(
            f"expected key and value of one shape, got {tuple(key.shape)} and {tuple(value.shape)}; "
            "they are the two halves of the same sequence"
        )
    if query.shape[-1] != embed_dim or key.shape[-1] != embed_dim:
        raise ValueError(
            f"expected query and key [..., {embed_dim}], got {tuple(query.shape)} and {tuple(key.shape)}; "
            f"this layer's embed_dim is {embed_dim}"
        )
    if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
        raise ValueError(
            f"expected query and key of one batch size, got {query.shape[batch_dim]} and "
            f"{key.shape[batch_dim]} (dimension {batch_dim}); check batch_first"
        )


def attention_mask(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor | None:
    """Both masks as one float mask to add to the scores.

    Args:
        q: ``[N, heads, L, head_dim]``.
        k: ``[N, heads, S, head_dim]``.
        attn_mask: ``[L, S]`` or ``[N·heads, L, S]``; True hides, a float is added.
        key_padding_mask: ``[N, S]``, or ``[S]`` for N = 1; True hides, a float is added.

    Returns:
        Broadcastable to ``[N, heads, L, S]`` in q's dtype, or None without masks.

    Raises:
        ValueError: Another shape.
        TypeError: Neither bool nor floating.
    """
    batch, heads, length, _ = q.shape
    source = k.shape[-2]
    merged = None
    if attn_mask is not None:
        allowed = [(length, source), (batch * heads, length, source)]
        merged = _additive("attn_mask", attn_mask, allowed, q.dtype)
        if merged.dim() == 3:
            merged = merged.view(batch, heads, length, source)
    if key_padding_mask is not None:
        allowed = [(batch, source), *([(source,)] if batch == 1 else [])]
        padding = _additive("key_padding_mask", key_padding_mask, allowed, q.dtype)
        padding = padding.reshape(batch, 1, 1, source)
        merged = padding if merged is None else merged + padding
    return merged


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention step by step, for callers who want to see the weights.

    Args:
        q: ``[N, heads, L, head_dim]``.
        k: ``[N, heads, S, head_dim]``.
        v: ``[N, heads, S, head_dim]``.
        mask: Added to the scores, or None.
        dropout: Probability of dropping an attention weight; 0 drops none.

    Returns:
        The output ``[N, heads, L, head_dim]`` and the weights ``[N, heads, L, S]``.
    """
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    if dropout > 0.0:
        weights = torch.dropout(weights, dropout, train=True)
    return weights @ v, weights


def _additive(name: str, mask: Tensor, allowed: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
    if tuple(mask.shape) not in allowed:
        raise ValueError(
            f"expected {name} of shape {' or '.join(map(str, allowed))}, got {tuple(mask.shape)}; "
            "its sizes come from query and key"
        )
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"expected {name} to be bool or floating, got {mask.dtype}; convert it with .bool()")
    return mask.to(dtype)
