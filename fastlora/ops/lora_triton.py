"""The ``triton`` backend of lora_linear: allocates, asks the plan for tiles, launches the kernels."""

import torch
from torch import Tensor

from fastlora.ops import lora_torch
from fastlora.ops._launch import current_device, is_aligned, row_major
from fastlora.ops._lora_paths import epilogue_forward, epilogue_grad_x, single_forward
from fastlora.ops.decide import choose
from fastlora.ops.keep_mask import drop_threshold, keep_probability
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.backward import lora_grad_a, lora_grad_s_b, lora_grad_x
from fastlora_kernels.lora.dora import dora_grad_product, dora_weight_norm
from fastlora_kernels.lora.down import lora_down
from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.lora.grad_x_a import lora_grad_x_a
from fastlora_kernels.lora.persistent import lora_forward_persistent, lora_grad_x_a_persistent
from fastlora_kernels.partials import sum_partials, sum_two_partials
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import MASK_WORD_BITS, Plan, Shape, Tile, cdiv


def keep_mask_shape(rows: int, in_features: int) -> tuple[tuple[int, int], torch.dtype]:
    """One bit an element, 32 to a word."""
    return (rows, cdiv(in_features, MASK_WORD_BITS)), torch.int32


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
    x, weight, lora_A, lora_B = row_major(x), row_major(weight), lora_A.contiguous(), lora_B.contiguous()
    (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    shape = Shape(m=m, n=n, k=k, r=r, aligned=is_aligned(x, weight, y))
    target = targets.detect(x.device)
    mask = None
    if seed is not None:
        mask_shape, mask_dtype = keep_mask_shape(shape.m, shape.k)
        mask = x.new_empty(mask_shape, dtype=mask_dtype)
    choice = choose("forward", shape, x.dtype, x.device, dropping=seed is not None, dora=factor is not None)
    layer = (x, weight, bias, lora_A, lora_B)
    if choice.path == "library":
        return lora_torch.forward(
            *layer, None, scaling=scaling, dropout=0.0, y=y, factor=factor, product=product
        )
    with current_device(x):
        if choice.path == "single":
            return single_forward(*layer, y, shape, target, scaling=scaling, tile=choice.tile), None
        down = plans.choose(kernels.LORA_DOWN, shape, x.dtype, target)
        s = _down(x, lora_A, seed, mask, down, scaling=scaling, dropout=dropout)
        if choice.path == "epilogue":
            epilogue_forward(x, weight, bias, s, lora_B, y, shape, target)
            return s, mask
        kernel = kernels.LORA_FORWARD if factor is None else kernels.DORA_FORWARD
        plan = plans.choose(kernel, shape, x.dtype, target, tile=choice.tile)
        if plan.tile.persistent:
            programs = target.multiprocessors
            lora_forward_persistent(x, weight, bias, s, lora_B, y, plan=plan, multiprocessors=programs)
        else:
            lora_forward(x, weight, bias, s, lora_B, y, plan=plan, factor=factor, product=product)
    return s, mask


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ of every row ``[N]``, in float32."""
    weight = row_major(weight)
    (n, k), r = weight.shape, lora_A.shape[0]
    shape = Shape(m=0, n=n, k=k, r=r, aligned=is_aligned(weight))
    plan = plans.choose(kernels.DORA_WEIGHT_NORM, shape, weight.dtype, targets.detect(weight.device))
    norm = weight.new_empty(n, dtype=torch.float32)
    with current_device(weight):
        a, b = lora_A.contiguous(), lora_B.contiguous()
        dora_weight_norm(weight, a, b, norm, scale=scaling, plan=plan)
    return norm


def grad_product(dy: Tensor, product: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """dU = factor ⊙ dY, and Σ_m dY ⊙ U where U is given; see :mod:`fastlora.ops._dora_library`."""
    dy = row_major(dy)
    m, n = dy.shape
    shape = Shape(m=m, n=n, k=0, r=1, aligned=is_aligned(dy))
    plan = plans.choose(kernels.DORA_GRAD_PRODUCT, shape, dy.dtype, targets.detect(dy.device))
    dproduct = dy.new_empty(m, n)
    partial = None if product is None else dy.new_empty(plan.splits, n, dtype=torch.float32)
    with current_device(dy):
        dora_grad_product(dy, product, factor, dproduct, partial, plan=plan)
        if partial is None:
            return dproduct, None
        dfactor = torch.empty_like(factor)
        sum_partials(partial, dfactor)
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
    """dS and dB, from one read of dY at low ranks, then dX = dY·W + mask ⊙ (dS·A) and dA = dSᵀ·dropped x."""
    dy, lora_B = row_major(dy), lora_B.contiguous()
    columns = next((t.shape[1] for t in (lora_A, x, weight) if t is not None), 0)
    aligned = is_aligned(*(t for t in (dy, x, weight) if t is not None))
    (m, n), r = dy.shape, lora_B.shape[1]
    shape = Shape(m=m, n=n, k=columns, r=r, aligned=aligned)
    target = targets.detect(dy.device)
    choice = choose("backward", shape, dy.dtype, dy.device, dropping=mask is not None)
    if choice.path == "library":
        return lora_torch.backward(
            dy, x, weight, lora_A, lora_B, s, None,
            scaling=scaling, dropout=0.0, need_x=need_x, need_A=need_A, need_B=need_B,
        )  # fmt: skip
    with current_device(dy):
        ds, db, db_partial = _grad_s_b(
            dy,
            s if s is not None else dy.new_zeros(shape.m, shape.r),
            lora_B,
            plans.choose(kernels.LORA_GRAD_S_B, shape, dy.dtype, target),
            scale=scaling / keep_probability(dropout),
        )
        weight, x = weight if need_x else None, x if need_A else None
        dx: Tensor | None = None
        if choice.path == "epilogue" and weight is not None and lora_A is not None:
            dx, weight = epilogue_grad_x(dy, weight, ds, lora_A, mask, shape, target), None
        fused_dx, da_partial = _grad_x_a(dy, weight, ds, lora_A, mask, x, shape, target, choice.tile)
        da = None
        if da_partial is not None and lora_A is not None:
            da = dy.new_empty(r, columns, dtype=lora_A.dtype)
        _sum_each((db_partial if need_B else None, db), (da_partial, da))
    return fused_dx if dx is None else dx, da, db if need_B else None


def _down(
    x: Tensor,
    lora_A: Tensor,
    seed: Tensor | None,
    mask: Tensor | None,
    plan: Plan,
    *,
    scaling: float,
    dropout: float,
) -> Tensor:
    s = x.new_empty(x.shape[0], lora_A.shape[0])
    partial = s if plan.splits == 1 else s.new_empty(plan.splits, *s.shape, dtype=torch.float32)
    lora_down(
        x,
        lora_A,
        seed,
        mask,
        partial,
        drop_threshold=drop_threshold(dropout),
        scale=scaling / keep_probability(dropout),
        plan=plan,
    )
    if plan.splits > 1:
        sum_partials(partial, s)
    return s


def _grad_s_b(
    dy: Tensor, s: Tensor, lora_B: Tensor, plan: Plan, *, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dS, dB and, where dB has still to be summed, its partial results."""
    (m, n), r = dy.shape, lora_B.shape[1]
    ds = dy.new_empty(m, r)
    if r > kernels.MOST_RANKS_PER_READ:
        torch.addmm(ds, dy, lora_B.to(dy.dtype), beta=0, alpha=scale, out=ds)
        return ds, (dy.t() @ s).to(lora_B.dtype), None
    ds_partial = dy.new_empty(cdiv(n, plan.tile.cols), m, r, dtype=torch.float32)
    db_partial = dy.new_empty(plan.splits, n, r, dtype=torch.float32)
    lora_grad_s_b(dy, s, lora_B, ds_partial, db_partial, scale=scale, plan=plan)
    sum_partials(ds_partial, ds)
    return ds, torch.empty_like(lora_B), db_partial


def _grad_x_a(
    dy: Tensor,
    weight: Tensor | None,
    ds: Tensor,
    lora_A: Tensor | None,
    mask: Tensor | None,
    x: Tensor | None,
    shape: Shape,
    target: Target,
    tile: Tile | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dX where there is a weight and dA's partial results where there is x, both in one launch."""
    if lora_A is None or (weight is None and x is None):
        return None, None
    # a tile is measured for both gradients together
    kernel, tile = (
        (kernels.LORA_GRAD_A, None) if weight is None
        else (kernels.LORA_GRAD_X, None) if x is None
        else (kernels.LORA_GRAD_X_A, tile)
    )  # fmt: skip
    plan = plans.choose(kernel, shape, dy.dtype, target, tile=tile)
    lora_A = lora_A.contiguous()
    dx = None if weight is None else dy.new_empty(shape.m, shape.k)
    da_partial = None if x is None else x.new_empty(plan.splits, shape.r, shape.k, dtype=torch.float32)
    if weight is not None and dx is not None and x is not None and da_partial is not None:
        operands = (dy, row_major(weight), ds, lora_A, mask, row_major(x), dx, da_partial)
        if plan.tile.persistent:
            lora_grad_x_a_persistent(*operands, plan=plan, multiprocessors=target.multiprocessors)
        else:
            lora_grad_x_a(*operands, plan=plan)
    elif weight is not None and dx is not None:
        lora_grad_x(dy, row_major(weight), ds, lora_A, mask, dx, plan=plan)
    elif x is not None and da_partial is not None:
        lora_grad_a(row_major(x), ds, mask, da_partial, plan=plan)
    return dx, da_partial


def _sum_each(*pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Fill each second tensor with the sum of the partial results before it, where there are any."""
    present = [(partial, out) for partial, out in pairs if partial is not None and out is not None]
    if len(present) == 2:
        sum_two_partials(*present)
    elif present:
        sum_partials(*present[0])
