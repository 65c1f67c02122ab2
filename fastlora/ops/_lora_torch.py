"""The ``torch`` backend of lora_linear: the split graph on library matrix products, with the fewest passes.

On a CPU the passes over x that dropout needs run in row blocks small enough for the cache, so that no second
copy of x ever exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora.ops._keep_mask import KEEP_MASK_DTYPE, draw_keep_mask, keep_probability, masked

_ELEMENTS_PER_BLOCK = 1 << 18


def keep_mask_shape(rows: int, in_features: int) -> tuple[tuple[int, int], torch.dtype]:
    """One byte an element."""
    return (rows, in_features), KEEP_MASK_DTYPE


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    y: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """y = x·Wᵀ + bias + S·Bᵀ, S = scaling/(1 - p) · dropout(x)·Aᵀ; see :mod:`fastlora.ops._lora_library`."""
    a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
    mask = None if seed is None else draw_keep_mask((x.shape[0], x.shape[1]), dropout, seed)
    s = x.new_empty(x.shape[0], a.shape[0])
    for rows, block in _dropped_blocks(x, mask):
        _scaled_product(block, a.t(), scaling / keep_probability(dropout), out=s[rows])
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
    y.addmm_(s, b.t())
    return s, mask


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    need_x: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS = scaling / (1 - p) · dY·B, dB = dYᵀ·S, dA = dSᵀ·dropped x, dX = dY·W + mask ⊙ (dS·A)."""
    dx = da = db = None
    if need_B and s is not None:
        db = (dy.t() @ s).to(lora_B.dtype)
    if lora_A is None or not (need_x or need_A):
        return dx, da, db
    ds = dy.new_empty(dy.shape[0], lora_B.shape[1])
    _scaled_product(dy, lora_B.to(dy.dtype), scaling / keep_probability(dropout), out=ds)
    if need_A and x is not None:
        da = _grad_a(ds, x, mask).to(lora_A.dtype)
    if need_x and weight is not None:
        dx = torch.mm(dy, weight)
        _add_low_rank(dx, ds, lora_A.to(dy.dtype), mask)
    return dx, da, db


def _scaled_product(left: Tensor, right: Tensor, scale: float, *, out: Tensor) -> None:
    torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def _grad_a(ds: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return ds.t() @ x
    # summed over blocks in float32 at least: a 16-bit sum would round once a block
    total = torch.zeros(
        ds.shape[1], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    )
    for rows, block in _dropped_blocks(x, mask):
        total += ds[rows].t() @ block
    return total


def _add_low_rank(dx: Tensor, ds: Tensor, a: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        dx.addmm_(ds, a)
        return
    for rows in _row_blocks(dx):
        product = ds[rows] @ a
        dx[rows] += masked(product, mask[rows], out=product)


def _dropped_blocks(x: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of x with the dropped elements zeroed; the whole of x at once where nothing is dropped."""
    if mask is None:
        yield slice(None), x
        return
    for rows in _row_blocks(x):
        block = x[rows]
        yield rows, masked(block, mask[rows], out=torch.empty_like(block))


def _row_blocks(tensor: Tensor) -> Iterator[slice]:
    rows, cols = tensor.shape
    step = rows
    if tensor.device.type == "cpu":
        step = max(64, _ELEMENTS_PER_BLOCK // max(cols, 1))
    for start in range(0, rows, max(step, 1)):
        yield slice(start, start + step)
