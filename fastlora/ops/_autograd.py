"""What the autograd Functions of the ops share: the mask's seed, and no silent second derivative."""

from typing import Any

import torch
from torch import Tensor


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Seed of a dropout mask, int64 ``[1]``, from torch's generator."""
    # on the tensors' own device, so that a GPU is never synchronised with the host
    return torch.randint(2**62, (1,), device=device, dtype=torch.int64, generator=generator)


def refuse_second_derivative(
    op: str, ctx: Any, dy: Tensor, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients; under ``create_graph`` they depend on their sources and refuse to be differentiated."""
    if not torch.is_grad_enabled():
        return gradients
    sources = [t for t in (dy, *ctx.saved_tensors) if t is not None and t.requires_grad]
    return tuple(g if g is None else _SecondDerivative.apply(op, g, *sources) for g in gradients)


class _SecondDerivative(torch.autograd.Function):
    """A gradient that depends on its sources, and says what to do when somebody differentiates it."""

    @staticmethod
    def forward(op: str, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            f"the fused {ctx.op} has no second derivative; run the forward pass under "
            "fastlora.use_backend('reference') to differentiate twice"
        )
