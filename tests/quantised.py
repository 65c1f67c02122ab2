"""Layers of other libraries with quantised weights, and what is asked of every one of them."""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from fastlora.functional import lora_linear
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.read import frozen_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def four_bit(
    n: int, k: int, quant_type: str = "nf4", blocksize: int = 64, *, nested: bool = True, **settings: object
) -> Any:
    """bitsandbytes' layer with a random weight ``[n, k]``."""
    layer: Any = Linear4bit(k, n, compress_statistics=nested, quant_type=quant_type, **settings)
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


def read(layer: nn.Module) -> FrozenWeight:
    """The layer's weight, which is understood."""
    weight = frozen_weight(layer)
    assert isinstance(weight, FrozenWeight), weight
    return weight


def assert_rows_are(
    weight: FrozenWeight, theirs: Callable[[torch.dtype], Tensor], dtype: torch.dtype
) -> None:
    """All rows at once and each part alone are the same bits as the library's own."""
    expected = theirs(dtype)
    dense = weight.dense(dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, expected)
    rows, step = weight.shape[0], weight.row_step
    for start in range(0, rows, step):
        for stop in {min(start + step, rows), rows}:
            assert torch.equal(weight.dense(dtype, slice(start, stop)), expected[start:stop]), (start, stop)


def trained(
    weight: FrozenWeight | Tensor, dtype: torch.dtype, dropout: float, rank: int = 4, m: int = 9
) -> list[Tensor]:
    """y, dX, dA and dB of a call over this weight, from the same random tensors every time."""
    torch.manual_seed(1)
    n, k = weight.shape
    draws = [torch.randn(m, k), torch.randn(rank, k) * k**-0.5, torch.randn(n, rank) * rank**-0.5]
    x, a, b = (draw.to(dtype).requires_grad_() for draw in draws)
    bias, dy = torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    y = lora_linear(x, weight, bias, a, b, scaling=1.7, dropout=dropout)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]
