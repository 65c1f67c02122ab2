"""The yardstick of every comparison: float64 is the truth, eager's error at the same dtype the tolerance.

Eager's error is one draw. Of a few numbers it may be far below the usual by luck, and which draw it is hangs
on how a CPU orders its sums; so where a result is further off, eager errs on the same numbers in other orders
too, and its largest error counts. Of many numbers all draws are alike: nothing is allowed there that was not.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FACTOR = 2.0
# with these, one number off by chance alone passes the factor less than once in 10,000
_REDRAWS = 32

Compute = Callable[[list[Tensor]], Sequence[Tensor]]


def packed(tensor: Tensor) -> Tensor:
    """A copy without margins: torch's 16-bit products on AMX read the NaN between our padded rows."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def assert_as_exact(
    names: Sequence[str],
    got: Sequence[Tensor],
    compute: Compute,
    operands: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Each result's error against float64 is at most FACTOR times eager's and a rounding; returns the ratios.

    Args:
        names: Of the results, for the message.
        got: The results.
        compute: The eager formula: results from operands.
        operands: What the results were made from.
        dtype: In which eager computes; without it, in the operands' own.
    """
    operands = [packed(operand) for operand in operands]
    exact = compute([operand.double() for operand in operands])
    theirs = compute(_in_dtype(operands, dtype))
    assert len(got) == len(exact)
    redraw = functools.cache(lambda: _redrawn_errors(compute, operands, dtype))
    ratios: dict[str, float] = {}
    for index, (name, value, truth, eager) in enumerate(zip(names, got, exact, theirs, strict=False)):
        assert value.shape == truth.shape, name
        assert value.dtype == eager.dtype, name
        if truth.numel() == 0:
            continue
        error, allowed = _error(value, truth), _error(eager, truth)
        rounding = _rounding(value, truth, operands)
        ratios[name] = float(error / allowed) if allowed > 0 else 0.0
        if not error <= FACTOR * allowed + rounding:
            allowed = torch.stack([allowed, *(errors[index] for errors in redraw())]).max()
        assert error <= FACTOR * allowed + rounding, f"{name}: error {error:.2e}, eager's {allowed:.2e}"
    return ratios


def _rounding(value: Tensor, truth: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """What is always allowed, since an axis of length one leaves eager exact: one rounding of the result.

    A sum of n numbers in their own dtype may err by √n of these, as the plainest order does; libraries sum in
    blocks. Sums of 16-bit numbers are fp32, and rounded once.
    """
    unit = torch.finfo(value.dtype).eps / 2
    if torch.finfo(value.dtype).bits >= 32:
        longest = max(max(operand.shape, default=1) for operand in operands)
        # tensor cores cut their sums off instead of rounding them: the errors have one sign and add up
        unit *= longest if value.is_cuda else longest**0.5
    allowed: Tensor = unit * truth.detach().norm()
    return allowed


def _redrawn_errors(
    compute: Compute, operands: Sequence[Tensor], dtype: torch.dtype | None
) -> list[list[Tensor]]:
    """Eager's errors on the operands' numbers in other orders, for each order and result."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(_REDRAWS):
        shuffled = [_shuffled(operand, generator) for operand in operands]
        exact = compute([operand.double() for operand in shuffled])
        theirs = compute(_in_dtype(shuffled, dtype))
        found.append([_error(*pair) for pair in zip(theirs, exact, strict=True)])
    return found


def _error(value: Tensor, truth: Tensor) -> Tensor:
    difference: Tensor = (value.double() - truth).detach().norm()
    return difference


def _in_dtype(operands: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    return [operand if dtype is None else operand.to(dtype) for operand in operands]


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)
