"""Models in plain PyTorch, shaped like ViT-B and LLaMA-8B's layers; random weights cost the same time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """A transformer's.

    Attributes:
        width: Columns of the residual stream.
        heads: Number of query heads.
        key_heads: Number of key and value heads; queries share them where they are fewer.
        inner: Columns inside of the MLP.
        layers: How many blocks.
        batch: Sequences in a batch.
        tokens: Tokens of a sequence.
        causal: A language model's block: RMSNorm, rotary positions, gated MLP, no biases, no look ahead.
    """

    width: int
    heads: int
    key_heads: int
    inner: int
    layers: int
    batch: int
    tokens: int
    causal: bool


VIT_B = Sizes(768, 12, 12, 3072, 12, batch=32, tokens=197, causal=False)
# four of the 32 blocks: all are alike
LLAMA_8B = Sizes(4096, 32, 8, 14336, 4, batch=2, tokens=2048, causal=True)


class Block(nn.Module):
    """Attention and MLP, each added to the stream after a norm of its own.

    Args:
        sizes: Sizes of the model.
        device: Where weights are made.
        dtype: Dtype of the weights.
    """

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        """Random weights."""
        super().__init__()
        self.sizes, width = sizes, sizes.width
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = nn.RMSNorm if sizes.causal else nn.LayerNorm
        bias, keys = not sizes.causal, width // sizes.heads * sizes.key_heads
        self.attention_norm, self.mlp_norm = norm(width, **made), norm(width, **made)
        self.query, self.out = (nn.Linear(width, width, bias, **made) for _ in range(2))
        self.key, self.value = (nn.Linear(width, keys, bias, **made) for _ in range(2))
        self.up, self.down = (
            nn.Linear(width, sizes.inner, bias, **made),
            nn.Linear(sizes.inner, width, bias, **made),
        )
        self.gate = nn.Linear(width, sizes.inner, bias, **made) if sizes.causal else None

    def forward(self, stream: Tensor, turn: Tensor) -> Tensor:
        """The stream ``[batch, tokens, width]`` after the block; ``turn`` is :func:`rotations`."""
        stream = stream + self._attention(self.attention_norm(stream), turn)
        h = self.mlp_norm(stream)
        inner = F.gelu(self.up(h)) if self.gate is None else F.silu(self.gate(h)) * self.up(h)
        out: Tensor = stream + self.down(inner)
        return out

    def _attention(self, h: Tensor, turn: Tensor) -> Tensor:
        heads = [
            projection(h).unflatten(-1, (-1, self.sizes.width // self.sizes.heads)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        ]
        query, key, value = heads
        if self.sizes.causal:
            query, key = _rotated(query, turn), _rotated(key, turn)
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=self.sizes.causal, enable_gqa=self.sizes.key_heads < self.sizes.heads
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Transformer(nn.Module):
    """Blocks on a stream that is given; there is nothing to look up.

    Args:
        sizes: Sizes of the model.
        device: Where weights are made.
        dtype: Dtype of the weights.
    """

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        """Random weights."""
        super().__init__()
        self.blocks = nn.ModuleList(Block(sizes, device, dtype) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, device=device, dtype=dtype)
        self.register_buffer("turn", rotations(sizes, device, dtype))

    def forward(self, stream: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same."""
        for block in self.blocks:
            stream = block(stream, self.turn)
        out: Tensor = self.norm(stream)
        return out


def rotations(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosine and sine for every token and half a head's columns, ``[2, tokens, columns]``."""
    half = sizes.width // sizes.heads // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.arange(sizes.tokens, device=device)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def _rotated(heads: Tensor, turn: Tensor) -> Tensor:
    (cosine, sine), (left, right) = turn, heads.chunk(2, dim=-1)
    return torch.cat([left * cosine - right * sine, left * sine + right * cosine], dim=-1)
