"""The ``triton`` backend of lora_linear: allocates, asks the plan for tiles, launches the kernels.

Tensors are 2-D: x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, S ``[M, R]``. S
carries the factor scaling / (1 - p), applied in float32, and so does dS: nothing else has to scale.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fastlora.ops import kernel_paths, lora_torch
from fastlora.ops.decide import Paths, is_aligned
from fastlora.ops.keep_mask import drop_threshold, empty_keep_mask, keep_probability
from fastlora.ops.runtime import current_device, row_major
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.backward import lora_grad_a, lora_grad_s_b, lora_grad_x
from fastlora_kernels.lora.down import lora_down
from fastlora_kernels.lora.epilogue import lora_add
from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.lora.grad_x_a import lora_grad_x_a
from fastlora_kernels.lora.persistent import lora_forward_persistent, lora_grad_x_a_persistent
from fastlora_kernels.lora.single import lora_forward_single
from fastlora_kernels.partials import sum_partials, sum_two_partials
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Plan, Shape, Tile, cdiv


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
    paths: Paths | None,
) -> tuple[Tensor, Tensor | None]:
    """Fill y = x·Wᵀ + bias + S·Bᵀ; S = scaling/(1 - p) · dropout(x)·Aᵀ and, with a seed, the dropout mask."""
    x, weight, lora_A, lora_B = row_major(x), row_major(weight), lora_A.contiguous(), lora_B.contiguous()
    shape, target = shape_of(x, weight, lora_A, y), targets.detect(x.device)
    choice = choice_of("forward", paths, shape, x, dropping=seed is not None)
    layer = (x, weight, bias, lora_A, lora_B)
    if choice.path == "library":
        # it would draw another mask
        assert seed is None
        return lora_torch.forward(*layer, None, scaling=scaling, dropout=0.0, y=y)
    with current_device(x):
        if choice.path == "single":
            return single_forward(*layer, y, shape, target, scaling=scaling, tile=choice.tile), None
        s, mask = down(x, lora_A, seed, shape, target, scaling=scaling, dropout=dropout)
        if choice.path == "epilogue":
            epilogue_forward(x, weight, bias, s, lora_B, y, shape, target)
            return s, mask
        plan = plans.choose(kernels.LORA_FORWARD, shape, x.dtype, target, tile=choice.tile)
        if plan.tile.persistent:
            programs = target.multiprocessors
            lora_forward_persistent(x, weight, bias, s, lora_B, y, plan=plan, multiprocessors=programs)
        else:
            lora_forward(x, weight, bias, s, lora_B, y, plan=plan)
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
    paths: Paths | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS and dB, from one read of dY at low ranks, then dX = dY·W + mask ⊙ (dS·A) and dA = dSᵀ·dropped x."""
    dy, lora_B = row_major(dy), lora_B.contiguous()
    columns = next((t.shape[1] for t in (lora_A, x, weight) if t is not None), 0)
    aligned = is_aligned(*(t for t in (dy, x, weight) if t is not None))
    (m, n), r = dy.shape, lora_B.shape[1]
    shape = Shape(m=m, n=n, k=columns, r=r, aligned=aligned)
    target = targets.detect(dy.device)
    choice = choice_of("backward", paths, shape, dy, dropping=mask is not None)
    if choice.path == "library":
        assert mask is None
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


def shape_of(x: Tensor, weight: Tensor, lora_A: Tensor, y: Tensor) -> Shape:
    """The sizes of a call on these tensors, and whether their rows can be read in wide words."""
    (m, k), n = x.shape, weight.shape[0]
    return Shape(m=m, n=n, k=k, r=lora_A.shape[0], aligned=is_aligned(x, weight, y))


def choice_of(
    part: Pass, paths: Paths | None, shape: Shape, x: Tensor, *, dropping: bool, dora: bool = False
) -> Choice:
    """What was decided; chosen now where it was left open, or for rows that no wide words can read."""
    if paths is not None and paths.shape == shape:
        return paths.forward if part == "forward" else paths.backward
    # left open by a compiled graph alone
    in_graph = paths is None
    return kernel_paths.choose(
        part, shape, x.dtype, x.device, dropping=dropping, dora=dora, in_graph=in_graph
    )


def down(
    x: Tensor,
    lora_A: Tensor,
    seed: Tensor | None,
    shape: Shape,
    target: Target,
    *,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """S and, with a seed, the dropout mask."""
    mask = None if seed is None else empty_keep_mask("triton", shape.m, x)
    plan = plans.choose(kernels.LORA_DOWN, shape, x.dtype, target)
    s = x.new_empty(shape.m, shape.r)
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
    return s, mask


def single_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    y: Tensor,
    shape: Shape,
    target: Target,
    *,
    scaling: float,
    tile: Tile | None = None,
) -> Tensor:
    """Fill y ``[M, N]`` in one launch; S."""
    s = x.new_empty(shape.m, shape.r)
    plan = plans.choose(kernels.LORA_FORWARD_SINGLE, shape, x.dtype, target, tile=tile)
    lora_forward_single(x, weight, bias, lora_A, lora_B, s, y, scale=scaling, plan=plan)
    return s


def epilogue_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    y: Tensor,
    shape: Shape,
    target: Target,
) -> None:
    """Fill y ``[M, N]`` by a library product and add S·Bᵀ to it."""
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
    _add_low_rank(s, lora_B, None, y, shape, target, transposed=True)


def epilogue_grad_x(
    dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, mask: Tensor | None, shape: Shape, target: Target
) -> Tensor:
    """dX = dY·W by a library product, plus mask ⊙ (dS·A)."""
    dx = dy.new_empty(shape.m, shape.k)
    torch.mm(dy, row_major(weight), out=dx)
    _add_low_rank(ds, lora_A.contiguous(), mask, dx, shape, target, transposed=False)
    return dx


def _add_low_rank(
    left: Tensor,
    right: Tensor,
    mask: Tensor | None,
    out: Tensor,
    shape: Shape,
    target: Target,
    *,
    transposed: bool,
) -> None:
    # out is read and written here, x and the weight are not
    plan = plans.choose(kernels.LORA_ADD, replace(shape, aligned=is_aligned(out)), out.dtype, target)
    lora_add(left, right, mask, out, transposed=transposed, plan=plan)


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
