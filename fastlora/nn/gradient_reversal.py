"""Gradient reversal as modules: with a fixed strength, or one that grows over the training."""

import torch
from torch import Tensor, nn

from fastlora._core.option_checks import check_count, check_finite, check_positive
from fastlora.ops.gradient_reversal import gradient_reversal


class GradientReversalLayer(nn.Module):
    """:func:`fastlora.gradient_reversal` as a module.

    Args:
        alpha: Factor of the turned gradient: a number or a tensor of one, or a schedule that is asked at
            each forward.

    Raises:
        TypeError: ``alpha`` is neither.
        ValueError: ``alpha`` is not finite.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> GradientReversalLayer(2.0)(x).sum().backward()
        >>> x.grad
        tensor([-2., -2.])
    """

    def __init__(self, alpha: "float | ReversalSchedule | Tensor" = 1.0) -> None:
        """See the class."""
        super().__init__()
        self.alpha = check_alpha(alpha)

    def forward(self, x: Tensor) -> Tensor:
        """``[...]`` to ``[...]``."""
        return gradient_reversal(x, self.alpha() if isinstance(self.alpha, ReversalSchedule) else self.alpha)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return "" if isinstance(self.alpha, ReversalSchedule) else f"alpha={self.alpha}"


def check_alpha(alpha: object) -> "float | ReversalSchedule | Tensor":
    """A strength of the reversal.

    Raises:
        TypeError: Neither a number nor a schedule.
        ValueError: Infinite or not a number.
    """
    if isinstance(alpha, ReversalSchedule | Tensor):
        return alpha
    return check_finite("alpha", alpha, "give a number or a fastlora.ReversalSchedule")


class ReversalSchedule(nn.Module):
    """λ(p) = high · (2 / (1 + e^(−γp)) − 1), p the share of the steps done (Ganin et al. 2016, JMLR 17(59)).

    The step is a buffer: it is in the state dict, so a resumed training goes on where it was, and a compiled
    model sees it change without a recompile.

    Args:
        total_steps: Calls of :meth:`advance` until p = 1; p stays there.
        gamma: How early λ rises.
        high: What λ goes towards.

    Raises:
        ValueError: ``total_steps`` < 1, or a number that is not finite and positive.

    Example:
        >>> schedule = ReversalSchedule(total_steps=2)
        >>> values = [round(schedule().item(), 4)]
        >>> for _ in range(2):
        ...     schedule.advance()
        ...     values.append(round(schedule().item(), 4))
        >>> values
        [0.0, 0.9866, 0.9999]
    """

    step: Tensor

    def __init__(self, total_steps: int, gamma: float = 10.0, high: float = 1.0) -> None:
        """See the class."""
        super().__init__()
        self.total_steps = check_count("total_steps", total_steps, "count the batches of the training")
        self.gamma = check_positive("gamma", gamma, "10.0 is the paper's")
        self.high = check_positive("high", high, "1.0 is the paper's")
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """λ now, float32 without dimensions."""
        progress = (self.step.to(torch.float32) / self.total_steps).clamp(max=1.0)
        # 2 / (1 + e^(−γp)) − 1 without cancellation near 0
        return self.high * torch.tanh(0.5 * self.gamma * progress)

    def advance(self) -> None:
        """Count a training step."""
        self.step += 1

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"total_steps={self.total_steps}, gamma={self.gamma}, high={self.high}"
