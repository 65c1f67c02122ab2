"""Results beside what eager PyTorch makes of the same numbers, both against float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.bench.gpu_check.items import Found

# as in the tests: eager's own error in the same dtype, times this
FACTOR = 2.0


def outputs_and_gradients(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> list[Tensor]:
    """What ``forward(*inputs)`` returns, and the gradients of all inputs.

    Args:
        forward: The computation.
        inputs: What it is called with.
        dy: The gradient of what it returns, in any dtype.
    """
    wanted = [each.detach().requires_grad_() for each in inputs]
    y = forward(*wanted)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def eager_and_exact(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`outputs_and_gradients` of the eager formula, in the inputs' own dtypes and in float64."""
    wide = [each.double() for each in inputs]
    return outputs_and_gradients(formula, inputs, dy), outputs_and_gradients(formula, wide, dy)


def outcome(
    case: str, what: str, got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], terms: int
) -> Found:
    """How far results are off: the one that uses most of what it is allowed to err.

    A result may err by twice as much as eager's and by a rounding more; a sum in float32 by a rounding for
    each of its terms, because tensor cores cut sums off and such errors add up.

    Args:
        case: The item that it belongs to.
        what: Pass, path and tile, or what else tells it from others of the case.
        got: The results.
        eager: Results of the eager formula in the same dtypes.
        exact: Results of the eager formula in float64.
        terms: Number of terms of the longest sum.
    """
    worst: dict[str, Any] = {"error": 0.0, "eager_error": 0.0, "allowed": 0.0, "used": 0.0}
    for value, theirs, truth in zip(got, eager, exact, strict=True):
        error, own = (float((each.double() - truth).norm()) for each in (value, theirs))
        allowed = FACTOR * own + _rounding(value, truth, terms)
        # a NaN is worse than any number
        used = error / allowed if error > 0 and allowed > 0 else (0.0 if error == 0 else math.inf)
        if used > worst["used"]:
            worst = {"error": error, "eager_error": own, "allowed": allowed, "used": used}
    right = worst["used"] <= 1
    finite = {name: value if math.isfinite(value) else None for name, value in worst.items()}
    return {"outcome": {"case": case, "what": what, "right": right, **finite}}


def equality(case: str, what: str, left: Tensor, right: Tensor) -> Found:
    """Whether two results are the same to the bit; of what differs, how many elements.

    Args:
        case: The item that it belongs to.
        what: What should be the same as what.
        left: One result.
        right: The other, of the same shape.
    """
    differing = int((left != right).sum())
    of = left.numel()
    told = what if not differing else f"{what}: {differing} of {of} elements differ"
    return {"outcome": {"case": case, "what": told, "right": differing == 0}}


def _rounding(value: Tensor, truth: Tensor, terms: int) -> float:
    unit = torch.finfo(value.dtype).eps / 2
    # sums of 16-bit numbers are float32, and rounded once
    return unit * (terms if value.dtype == torch.float32 else 1) * float(truth.norm())
