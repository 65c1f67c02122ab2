"""LoRA's two passes over a quantised frozen weight: its rows become dense for the time of their product.

The layer is cut along its outputs into parts whose dense weight fits the workspace, as a rule one, and every
part runs :mod:`fastlora.ops.lora_passes`; forward, where nothing traces the call, S is computed once and each
part of y filled where it lies. The parts of dA add up in float32, and so do those of dX where there are many.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastlora._core import backend
from fastlora.ops import lora_torch
from fastlora.ops.decide import Decision
from fastlora.ops.lora_passes import lora_linear_backward, lora_linear_forward
from fastlora.ops.runtime import in_dtype, rows_of, unrecorded
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.in_graphs import rows_for
from fastlora_kernels.quant.kernels import DECODE

# so many parts of dX add up in their own dtype: eager rounds its two products and their sum, each once
_FEW = 8


def forward(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y ``[..., N]``, S and the mask, as of :func:`~fastlora.ops.lora_passes.lora_linear_forward`."""
    *settings, decision = more
    if decision.paths is not None and decision.paths.forward.path == DECODE:
        decoded = _decoded(x, weight, bias, lora_A, lora_B, *more)
        if decoded is not None:
            return decoded
        # the paths over dense rows are chosen anew
        decision = Decision(decision.backend, known=decision.known)
        more = (*settings, decision)
    parts = list(weight.parts(x.dtype))
    if len(parts) == 1:
        return lora_linear_forward(x, rows_for(x, weight), bias, lora_A, lora_B, *more)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    if _is_untraced(x, lora_A, lora_B):
        return y, *_fill(y, parts, x, weight, bias, lora_A, lora_B, *more)
    run: Any = lora_linear_forward
    s = mask = None
    for rows in parts:
        of_rows = None if bias is None else bias[rows]
        # of the same seed every part draws the same mask
        part = (x, rows_for(x, weight, rows), of_rows, lora_A, lora_B[rows])
        y[..., rows], *kept = run(*part, *settings, _for_a_part(decision))
        s, mask = (s, mask) if s is not None else kept
    assert s is not None
    return y, s, mask


def _decoded(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    decision: Decision,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """As :func:`forward`, of a weight that is decoded in the product; None where it can't be in this call."""
    if not weight.is_decodable or not _is_untraced(x, lora_A, lora_B):
        return None
    # imported late: Triton is not installed everywhere
    from fastlora.ops.weights import decode_triton

    settings: Any = {"scaling": scaling, "dropout": dropout, "decision": decision}
    return decode_triton.forward(x, weight, bias, lora_A, lora_B, seed, **settings)


def _fill(
    y: Tensor,
    parts: list[slice],
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    decision: Decision,
) -> tuple[Tensor, Tensor | None]:
    """S and the mask, once; y where it lies, a part of its columns after the other."""
    make_s, fill_from_s = _halves(decision)
    dropout = dropout if seed is not None else 0.0
    with unrecorded(x):
        s, mask = make_s(rows_of(x), lora_A, seed, scaling=scaling, dropout=dropout)
        _fill_rows(y, parts, x, weight, bias, s, lora_B, fill_from_s)
    return s, mask


def _fill_rows(
    y: Tensor, parts: list[slice], x: Tensor, weight: FrozenWeight, bias: Tensor | None, s: Tensor,
    lora_B: Tensor, fill_from_s: Any,
) -> None:  # fmt: skip
    """y from S where it lies, a part of its columns after the other."""
    rows_of_x, rows_of_y = rows_of(x), rows_of(y)
    bias = None if bias is None else in_dtype(bias, x.dtype)
    for rows in parts:
        of_rows = None if bias is None else bias[rows]
        part = (rows_for(x, weight, rows), of_rows, s, lora_B[rows], rows_of_y[:, rows])
        fill_from_s(rows_of_x, *part)


def from_s(
    x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None, s: Tensor, lora_B: Tensor
) -> Tensor:
    """y ``[..., N]`` by library products, of a dense or quantised weight, from S ``[M, R]``."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    with unrecorded(x):
        if isinstance(weight, FrozenWeight):
            _fill_rows(y, list(weight.parts(x.dtype)), x, weight, bias, s, lora_B, lora_torch.fill_from_s)
        else:
            bias = None if bias is None else in_dtype(bias, x.dtype)
            lora_torch.fill_from_s(rows_of(x), in_dtype(weight, x.dtype), bias, s, lora_B, rows_of(y))
    return y


def _halves(decision: Decision) -> tuple[Any, Any]:
    """What makes S and the mask, and what fills a part of y from S."""
    if decision.backend == "torch":
        return lora_torch.make_s, lora_torch.fill_from_s
    # imported late: Triton is not installed everywhere
    from fastlora.ops import lora_triton

    return lora_triton.make_s, partial(lora_triton.fill_from_s, paths=decision.paths)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: FrozenWeight,
    lora_A: Tensor | None,
    lora_B: Tensor,
    *more: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB, as of :func:`~fastlora.ops.lora_passes.lora_linear_backward`."""
    parts = list(weight.parts(dy.dtype))
    if len(parts) == 1:
        return lora_linear_backward(dy, x, rows_for(dy, weight), lora_A, lora_B, *more)
    *settings, decision = more
    run: Any = lora_linear_backward
    dx: Tensor | None = None
    da: Tensor | None = None
    dbs: list[Tensor] = []
    for rows in parts:
        part = (dy[..., rows], x, rows_for(dy, weight, rows), lora_A, lora_B[rows])
        dx_part, da_part, db_part = run(*part, *settings, _for_a_part(decision))
        dx, da = _added(dx, dx_part, wide=len(parts) > _FEW), _added(da, da_part)
        if db_part is not None:
            dbs.append(db_part)
    return (
        None if dx is None else dx.to(dy.dtype),
        None if da is None or lora_A is None else da.to(lora_A.dtype),
        torch.cat(dbs) if dbs else None,
    )


def rows_of_both(dy: Tensor, weight: Tensor | FrozenWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns of dY ``[M, N]`` and the dense rows of W in its dtype whose products add up to dY·W.

    Args:
        dy: ``[M, N]``.
        weight: ``[N, K]``, dense or quantised.
    """
    if not isinstance(weight, FrozenWeight):
        yield dy, in_dtype(weight, dy.dtype)
        return
    for rows in weight.parts(dy.dtype):
        yield dy[:, rows], rows_for(dy, weight, rows)


def in_few_parts(weight: Tensor | FrozenWeight, dtype: torch.dtype) -> bool:
    """Whether dX may be summed over a weight's parts in its own dtype.

    Args:
        weight: ``[N, K]``, dense or quantised.
        dtype: dX's.
    """
    return not isinstance(weight, FrozenWeight) or len(list(weight.parts(dtype))) <= _FEW


def _is_untraced(*tensors: Tensor) -> bool:
    """Whether parts may be written into a result: what traces a call, or has no memory, needs operators."""
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return False
    return backend.are_plain(*tensors) and not any(each.is_meta for each in tensors)


def _for_a_part(decision: Decision) -> Decision:
    """A decision without what the whole weight's forward pass prepares; its paths are for another shape."""
    return Decision(decision.backend, decision.paths)


def _added(total: Tensor | None, part: Tensor | None, *, wide: bool = True) -> Tensor | None:
    """The sum so far, and one part more; in 16 bits every addition rounds, unless it is ``wide``."""
    if part is None:
        return total
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32)) if wide else part
    return total.add_(part)
