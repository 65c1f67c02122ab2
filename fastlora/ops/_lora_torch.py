"""The ``torch`` backend of lora_linear: the split graph on library matrix products, with the fewest passes.

On a CPU the passes over x that dropout needs run in row blocks small enough for the cache, so that no second
copy of x ever exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora.ops._keep_mask import KEEP_MASK_DTYPE, draw_keep_mask, keep_probability, masked
from fastlora.ops._packing import packed

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
    factor: Tensor | None = None,
    product: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = x·Wᵀ + bias + S·Bᵀ, S = scaling/(1 - p) · dropout(x)·Aᵀ; see :mod:`fastlora.ops._lora_library`."""
    x, weight = packed(x), packed(weight)
    a, b = packed(lora_A.to(x.dtype)), packed(lora_B.to(x.dtype))
    mask = None if seed is None else draw_keep_mask((x.shape[0], x.shape[1]), dropout, seed)
    s = x.new_empty(x.shape[0], a.shape[0])
    for rows, block in _dropped_blocks(x, mask):
        _scaled_product(block, a.t(), scaling / keep_probability(dropout), out=s[rows])
    out = y if product is None else product
    if bias is None or factor is not None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    out.addmm_(s, b.t())
    if factor is not None:
        _scale_columns(out, factor, bias, y)
    return s, mask


def _scale_columns(product: Tensor, factor: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = factor ⊙ product + bias, in the factor's float32, so that it is rounded once."""
    for rows in _row_blocks(y):
        scaled = product[rows] * factor
        y[rows] = scaled if bias is None else scaled.add_(bias)


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ of every row ``[N]``, some rows at a time."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = lora_A.to(wide), lora_B.to(wide)
    norm = weight.new_empty(weight.shape[0], dtype=wide)
    # an accelerator takes more at a time, for fewer launches
    step = max(64, _ELEMENTS_PER_BLOCK * (1 if weight.is_cpu else 16) // max(weight.shape[1], 1))
    for w_rows, b_rows, out in zip(weight.split(step), b.split(step), norm.split(step), strict=True):
        torch.linalg.vector_norm(torch.addmm(w_rows.to(wide), b_rows, a, alpha=scaling), dim=1, out=out)
    return norm


def grad_product(dy: Tensor, product: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """dU = factor ⊙ dY, and Σ_m dY ⊙ U where U is given; see :mod:`fastlora.ops._dora_library`."""
    dproduct = dy.new_empty(dy.shape)
    dfactor = None if product is None else torch.zeros_like(factor)
    for rows in _row_blocks(dy):
        block = dy[rows].to(factor.dtype)
        dproduct[rows] = block * factor
        if product is not None and dfactor is not None:
            dfactor += (block * product[rows]).sum(0)
    return dproduct, dfactor


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
    dy = packed(dy)
    if need_B and s is not None:
        db = (dy.t() @ s).to(lora_B.dtype)
    if lora_A is None or not (need_x or need_A):
        return dx, da, db
    ds = dy.new_empty(dy.shape[0], lora_B.shape[1])
    _scaled_product(dy, packed(lora_B.to(dy.dtype)), scaling / keep_probability(dropout), out=ds)
    if need_A and x is not None:
        da = _grad_a(ds, packed(x), mask).to(lora_A.dtype)
    if need_x and weight is not None:
        dx = torch.mm(dy, packed(weight))
        _add_low_rank(dx, ds, packed(lora_A.to(dy.dtype)), mask)
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
