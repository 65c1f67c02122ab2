"""The ``torch`` backend of lora_linear: the split graph on library matrix products, with the fewest passes.

On a CPU the passes over x that dropout needs run in row blocks small enough for the cache, so that no second
copy of x ever exists. Blocks are as few as that allows: every operation on one waits for all threads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora.ops._packing import packed
from fastlora.ops.keep_mask import KEEP_MASK_DTYPE, draw_keep_mask, keep_probability, mask_, masked
from fastlora.ops.runtime import in_dtype

_ELEMENTS_PER_BLOCK = 1 << 19


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
    a, b = packed(in_dtype(lora_A, x.dtype)), packed(in_dtype(lora_B, x.dtype))
    s, mask = x.new_empty(x.shape[0], a.shape[0]), None
    if seed is None:
        _scaled_product(x, a.t(), scaling, out=s)
    else:
        mask = draw_keep_mask((x.shape[0], x.shape[1]), dropout, seed)
        for x_rows, keep, s_rows in _row_blocks(x, mask, s):
            _scaled_product(masked(x_rows, keep), a.t(), scaling / keep_probability(dropout), out=s_rows)
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
    for rows, y_rows in _row_blocks(product, y):
        scaled = rows * factor
        y_rows.copy_(scaled if bias is None else scaled.add_(bias))


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
    # without a product the second of the two is not looked at
    for dy_rows, product_rows, out in _row_blocks(dy, dy if product is None else product, dproduct):
        block = dy_rows.to(factor.dtype)
        torch.mul(block, factor, out=out)
        if dfactor is not None:
            dfactor += (block * product_rows).sum(0)
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
        db = in_dtype(dy.t() @ s, lora_B.dtype)
    if lora_A is None or not (need_x or need_A):
        return dx, da, db
    ds = dy.new_empty(dy.shape[0], lora_B.shape[1])
    _scaled_product(dy, packed(in_dtype(lora_B, dy.dtype)), scaling / keep_probability(dropout), out=ds)
    a = packed(in_dtype(lora_A, dy.dtype))
    x = packed(x) if need_A and x is not None else None
    weight = packed(weight) if need_x and weight is not None else None
    if mask is not None:
        dx, da = _dropped_gradients(dy, x, weight, a, ds, mask)
    else:
        da = None if x is None else ds.t() @ x
        dx = None if weight is None else torch.mm(dy, weight).addmm_(ds, a)
    return dx, None if da is None else in_dtype(da, lora_A.dtype), db


def _dropped_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, a: Tensor, ds: Tensor, mask: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dX where there is a weight, and dA where there is an x."""
    da = None
    dx = None if weight is None else dy.new_empty(dy.shape[0], a.shape[1])
    # without an x, or without dX, the mask stands in for it and is not looked at
    blocks = _row_blocks(mask, ds, mask if x is None else x, mask if dx is None else dx)
    for keep, ds_rows, x_rows, dx_rows in blocks:
        if x is not None:
            part = ds_rows.t() @ masked(x_rows, keep)
            # summed over blocks in float32 at least: a 16-bit sum would round once a block
            da = part if da is None else da.to(torch.promote_types(da.dtype, torch.float32)).add_(part)
        if dx is not None:
            mask_(torch.mm(ds_rows, a, out=dx_rows), keep)
    if dx is not None and weight is not None:
        # added inside the product, where its sums are in float32
        dx.addmm_(dy, weight)
    return dx, da


def _scaled_product(left: Tensor, right: Tensor, scale: float, *, out: Tensor) -> None:
    torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, as many as the caches hold of the first; all on an accelerator."""
    rows, cols = tensors[0].shape
    # caches are each core's own; what a block takes stays a few MiB
    elements = _ELEMENTS_PER_BLOCK * min(torch.get_num_threads(), 4)
    step = max(64, elements // max(cols, 1))
    if rows <= step or not tensors[0].is_cpu:
        return iter((tensors,))
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)
