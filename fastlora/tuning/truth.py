"""What a layer call has to compute, in float64, in memory that a small card has left beside the call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.ops.keep_mask import keep_probability
from fastlora.tuning.candidates import SCALING, Tensors, run_eager

# y and dX are compared on so many rows, spread evenly: of each tile of 128 rows one at least, up to 65,536
_ROWS = 512
# float64 copies of rows, for the sums over all of them
_BLOCK_BYTES = 2**28
# as in the tests: eager's own error in the same dtype, times this
_FACTOR = 2.0


class WrongResult(RuntimeError):
    """A candidate computes something else than the eager formula."""


@dataclass(frozen=True)
class Truth:
    """y and dX of some rows, dA and dB of all, exactly and as the eager formula has them in the call's dtype.

    Attributes:
        rows: Indices of the rows of y and dX that are compared.
        exact: y, dX, dA and dB in float64.
        allowed: Norm of the error that each may have.
    """

    rows: Tensor
    exact: tuple[Tensor, Tensor, Tensor, Tensor]
    allowed: tuple[float, float, float, float]

    def check(self, got: Sequence[Tensor], first: int) -> None:
        """Compare what a candidate computed.

        Args:
            got: Some of y, dX, dA and dB, in this order.
            first: Index of the first that is given.

        Raises:
            WrongResult: One errs by more than twice eager's own error and half a rounding step.
        """
        for index, value in enumerate(got, first):
            error, allowed = (
                _error(_compared(value, index, self.rows), self.exact[index]),
                self.allowed[index],
            )
            if not error <= allowed:
                raise WrongResult(f"errs by {error:.2e} where {allowed:.2e} is allowed")


def truth_of(tensors: Tensors, keep: Tensor | None, *, unrounded: bool = False) -> Truth:
    """What a call's results are compared with.

    Args:
        tensors: The call.
        keep: The dropout mask as bool ``[rows, inputs]``; None without dropout.
        unrounded: Whether it is compared with paths that don't round a quantised W.
    """
    count = tensors.x.shape[0]
    spread = torch.linspace(0, count - 1, min(count, _ROWS), dtype=torch.float64, device=tensors.x.device)
    rows = spread.round().long()
    some = replace(tensors, x=tensors.x[rows], dy=tensors.dy[rows]).to(torch.float64, unrounded=unrounded)
    y, dx, _, _ = run_eager(some, keep=None if keep is None else keep[rows])
    del some
    exact = (y, dx, *_exact_sums(tensors, keep))
    eager = run_eager(tensors, keep=keep)
    allowed = (
        _allowed(_compared(value, index, rows), truth)
        for index, (value, truth) in enumerate(zip(eager, exact, strict=True))
    )
    return Truth(rows, exact, tuple(allowed))  # type: ignore[arg-type]


def truths_of_sum(layers: Sequence[Tensors], keeps: Sequence[Tensor | None]) -> list[Truth]:
    """What the gradients of layers on one x are compared with: of the first dX is the sum over all.

    Args:
        layers: The call of each.
        keeps: The dropout mask of each as bool ``[rows, inputs]``; None without dropout.
    """
    truths = [truth_of(layer, keep) for layer, keep in zip(layers, keeps, strict=True)]
    first, *others = truths
    dx = run_eager(layers[0], keep=keeps[0])[1]
    for layer, keep in zip(layers[1:], keeps[1:], strict=True):
        dx = dx + run_eager(layer, keep=keep)[1]
    y, own, da, db = first.exact
    exact = own + sum(each.exact[1] for each in others)
    of_y, _, of_a, of_b = first.allowed
    allowed = (of_y, _allowed(dx[first.rows], exact), of_a, of_b)
    return [replace(first, exact=(y, exact, da, db), allowed=allowed), *others]


def _exact_sums(tensors: Tensors, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """dA and dB, summed over blocks of rows."""
    a, b = tensors.lora_A.double(), tensors.lora_B.double()
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    size = max(1, _BLOCK_BYTES // (8 * max(tensors.x.shape[1], tensors.dy.shape[1])))
    for start in range(0, tensors.x.shape[0], size):
        block = slice(start, start + size)
        x, dy = tensors.x[block].double(), tensors.dy[block].double()
        if keep is not None:
            x.mul_(keep[block]).div_(keep_probability(tensors.dropout))
        da.addmm_((dy @ b).t(), x, alpha=SCALING)
        db.addmm_(dy.t(), x @ a.t(), alpha=SCALING)
    return da, db


def _compared(value: Tensor, index: int, rows: Tensor) -> Tensor:
    # dA and dB have no rows of their own
    return value[rows] if index < 2 else value


def _allowed(eager: Tensor, exact: Tensor) -> float:
    return _FACTOR * _error(eager, exact) + torch.finfo(eager.dtype).eps / 2 * float(exact.norm())


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm())
