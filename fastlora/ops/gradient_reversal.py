"""Gradient reversal: the identity forward, the gradient turned round backward."""

from typing import Any

import torch
from torch import Tensor


class GradientReversal(torch.autograd.Function):
    """y = x, dx = −alpha · dy, and no gradient for alpha (Ganin et al. 2016, JMLR 17(59)).

    ``GradientReversal.apply(x, alpha)``; :func:`gradient_reversal` checks its arguments first.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> GradientReversal.apply(x, 2.0).sum().backward()
        >>> x.grad
        tensor([-2., -2.])
    """

    @staticmethod
    def forward(x: Tensor, alpha: float | Tensor) -> Tensor:
        """A new tensor with the values of ``x``: in-place work on it must not reach ``x``."""
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep alpha."""
        _, alpha = inputs
        ctx.alpha = None if isinstance(alpha, Tensor) else alpha
        if ctx.alpha is None:
            ctx.save_for_backward(alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient, turned round."""
        (gradient,) = gradients
        alpha = ctx.saved_tensors[0].to(gradient.dtype) if ctx.alpha is None else ctx.alpha
        return gradient * -alpha, None


def gradient_reversal(x: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
    """The same values as ``x``, whose gradient arrives there times −alpha.

    Args:
        x: Floating point, any shape.
        alpha: How strongly. A tensor may change between calls of a compiled function without a recompile.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``alpha`` no number or tensor.
        ValueError: ``alpha`` is a tensor of more than one element.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradient_reversal(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected x as a floating-point tensor, got {kind}")
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise ValueError(f"expected alpha as one number, got a tensor of shape {tuple(alpha.shape)}")
        # its shape must not spread to the gradient
        alpha = alpha.detach().reshape(())
    elif isinstance(alpha, bool) or not isinstance(alpha, int | float | torch.SymFloat):
        raise TypeError(f"expected alpha as a number or a tensor, got {type(alpha).__name__}")
    # not math.isfinite: under torch.compile a number that changes is symbolic
    elif not abs(alpha) < float("inf"):
        raise ValueError(f"expected a finite alpha, got {alpha!r}; 1.0 reverses as is")
    reversed_: Tensor = GradientReversal.apply(x, alpha)
    return reversed_
