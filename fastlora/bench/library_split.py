"""LoRA as the fast trainers write it by hand: library products and ``addmm_``, without fastlora."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Split(torch.autograd.Function):
    """y = x·Wᵀ + bias + s·x'·Aᵀ·Bᵀ, keeping x, A and B as Unsloth does; x' is x or its dropped copy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        source = x if dropped is None else dropped
        y = F.linear(x, weight, bias)
        y.addmm_(source @ a.t(), b.t(), alpha=scaling)
        ctx.save_for_backward(source, weight, lora_a, lora_b)
        ctx.scaling, ctx.has_dropped = scaling, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        source, weight, lora_a, lora_b = ctx.saved_tensors
        a, b, scaling = lora_a.to(dy.dtype), lora_b.to(dy.dtype), ctx.scaling
        ds = dy @ b
        grad_a = (ds.t() @ source).mul_(scaling).to(lora_a.dtype)
        # S once more instead of kept
        grad_b = (dy.t() @ (source @ a.t())).mul_(scaling).to(lora_b.dtype)
        dx, ddropped = dy @ weight, None
        if ctx.has_dropped:
            ddropped = (ds @ a).mul_(scaling)
        else:
            dx.addmm_(ds, a, alpha=scaling)
        return dx, ddropped, None, None, grad_a, grad_b, None


class LibrarySplit(nn.Module):
    """A frozen linear layer with LoRA; dropout is torch's, outside, as Axolotl does it."""

    def __init__(
        self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float
    ) -> None:
        """Shares every tensor."""
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, dropout
        self.lora_a, self.lora_b = lora_a, lora_b

    def forward(self, x: Tensor) -> Tensor:
        """``[m, k]`` to ``[m, n]``."""
        dropped = F.dropout(x, self.dropout) if self.dropout else None
        y: Tensor = _Split.apply(
            x, dropped, self.base.weight, self.base.bias, self.lora_a, self.lora_b, self.scaling
        )
        return y
