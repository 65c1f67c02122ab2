"""The ``torch`` backend of lora_linear: the split graph on library matrix products, with the fewest passes.

Tensors are 2-D: x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, S ``[M, R]``. S
carries the factor scaling / (1 - p), applied in float32, and so does dS: nothing else has to scale.

On a CPU the passes over x that dropout needs run in row blocks small enough for the cache, so that no second
copy of x ever exists. Blocks are as few as that allows: every operation on one waits for all threads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora.ops.keep_mask import draw_keep_mask, keep_probability, mask_, masked
from fastlora.ops.runtime import in_dtype, packed

ELEMENTS_PER_BLOCK = 1 << 19


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    y: Tensor,
    *,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Fill y = x·Wᵀ + bias + S·Bᵀ; S = scaling/(1 - p) · dropout(x)·Aᵀ and, with a seed, the dropout mask."""
    x = packed(x)
    s, mask = make_s(x, lora_A, seed, scaling=scaling, dropout=dropout)
    fill_from_s(x, weight, bias, s, lora_B, y)
    return s, mask


def make_s(
    x: Tensor, lora_A: Tensor, seed: Tensor | None, *, scaling: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """S = scaling/(1 - p) · dropout(x)·Aᵀ and, with a seed, the dropout mask: the first half of a call."""
    mask = None if seed is None else draw_keep_mask((x.shape[0], x.shape[1]), dropout, seed)
    return s_of_dropped(x, lora_A, mask, scaling=scaling, dropout=dropout), mask


def s_of_dropped(x: Tensor, lora_A: Tensor, mask: Tensor | None, *, scaling: float, dropout: float) -> Tensor:
    """S = scaling/(1 - p) · dropped x·Aᵀ of a mask that was drawn, or without one."""
    x, a = packed(x), packed(in_dtype(lora_A, x.dtype))
    s = x.new_empty(x.shape[0], a.shape[0])
    if mask is None:
        scaled_product(x, a.t(), scaling, out=s)
    else:
        for x_rows, keep, s_rows in row_blocks(x, mask, s):
            scaled_product(masked(x_rows, keep), a.t(), scaling / keep_probability(dropout), out=s_rows)
    return s


def fill_from_s(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor, y: Tensor) -> None:
    """Fill y = x·Wᵀ + bias + S·Bᵀ, which may be columns of a wider matrix: the second half of a call."""
    multiply(packed(x), packed(weight), bias, y)
    y.addmm_(s, packed(in_dtype(lora_B, x.dtype)).t())


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill y = x·Wᵀ + bias.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        bias: ``[N]``, or None.
        y: ``[M, N]``.
    """
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


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
    scaled_product(dy, packed(in_dtype(lora_B, dy.dtype)), scaling / keep_probability(dropout), out=ds)
    a = packed(in_dtype(lora_A, dy.dtype))
    x = packed(x) if need_A and x is not None else None
    weight = packed(weight) if need_x and weight is not None else None
    if mask is not None:
        dx = None if weight is None else dy.new_empty(dy.shape[0], a.shape[1])
        da = dropped_gradients(x, a, ds, mask, dx, add=False)
        if dx is not None and weight is not None:
            # added inside the product, where its sums are in float32
            dx.addmm_(dy, weight)
    else:
        da = None if x is None else ds.t() @ x
        dx = None if weight is None else torch.mm(dy, weight).addmm_(ds, a)
    return dx, None if da is None else in_dtype(da, lora_A.dtype), db


def dropped_gradients(
    x: Tensor | None, a: Tensor, ds: Tensor, mask: Tensor, dx: Tensor | None, *, add: bool
) -> Tensor | None:
    """dA where there is an x; mask ⊙ (dS·A) becomes dX where there is one, or is added to it."""
    da = None
    # without an x, or without dX, the mask stands in for it and is not looked at
    blocks = row_blocks(mask, ds, mask if x is None else x, mask if dx is None else dx)
    for keep, ds_rows, x_rows, dx_rows in blocks:
        if x is not None:
            part = ds_rows.t() @ masked(x_rows, keep)
            # summed over blocks in float32 at least: a 16-bit sum would round once a block
            da = part if da is None else da.to(torch.promote_types(da.dtype, torch.float32)).add_(part)
        if dx is not None and add:
            term = torch.mm(ds_rows, a)
            mask_(term, keep)
            dx_rows.add_(term)
        elif dx is not None:
            mask_(torch.mm(ds_rows, a, out=dx_rows), keep)
    return da


def scaled_product(left: Tensor, right: Tensor, scale: float, *, out: Tensor) -> None:
    """Fill ``out`` with scale · left·right."""
    torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, as many as the caches hold of the first; all on an accelerator."""
    rows, cols = tensors[0].shape
    # caches are each core's own; what a block takes stays a few MiB
    elements = ELEMENTS_PER_BLOCK * min(torch.get_num_threads(), 4)
    step = max(64, elements // max(cols, 1))
    if rows <= step or not tensors[0].is_cpu:
        return iter((tensors,))
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)
