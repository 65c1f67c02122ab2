"""The backward pass of lora_linear's ``triton`` backend: its launches, prepared by the plan.

Tensors are 2-D: dY ``[M, N]``, x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, S
``[M, R]``. dS carries the factor scaling / (1 - p), applied in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops import lora_torch
from fastlora.ops.decide import Paths, in_wide_words, is_aligned
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_triton import add_low_rank, by_library, choice_of
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import contiguous, row_major, unrecorded
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.launch import Ready
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.backward import lora_grad_a, lora_grad_s_b, lora_grad_x
from fastlora_kernels.lora.grad_x_a import lora_grad_x_a
from fastlora_kernels.lora.persistent import lora_grad_x_a_persistent
from fastlora_kernels.partials import sum_partials, sum_two_partials
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, cdiv

# computes dX, dA and dB from dy, x, weight, lora_A, lora_B, S and the mask
Backward = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
# computes dS, dB and, where dB has still to be summed, its partial results, from dY, S and B
GradSB = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# computes dX, dA and dA's partial results, which have still to be summed, from dY, W, dS, A, the mask and x
GradXA = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


@prepared(row_major, row_major, row_major, contiguous, contiguous, contiguous, contiguous)
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
) -> Backward:
    """dS and dB, from one read of dY at low ranks, then dX = dY·W + mask ⊙ (dS·A) and dA = dSᵀ·dropped x."""
    columns = next((t.shape[1] for t in (lora_A, x, weight) if t is not None), 0)
    aligned = is_aligned(*(t for t in (dy, x, weight) if t is not None))
    (m, n), r = dy.shape, lora_B.shape[1]
    shape, target = Shape(m=m, n=n, k=columns, r=r, aligned=aligned), targets.detect(dy.device)
    choice = choice_of("backward", paths, shape, dy, dropping=mask is not None)
    if choice.path == "library":
        assert mask is None
        needs = {"need_x": need_x, "need_A": need_A, "need_B": need_B}
        return by_library(lora_torch.backward, scaling=scaling, dropout=0.0, **needs)
    s_and_b = grad_s_b(dy, lora_B, shape, target, scale=scaling / keep_probability(dropout))
    x_and_a = grad_x_a(
        dy, lora_A, shape, target, choice,
        need_x=need_x and lora_A is not None, need_A=need_A and lora_A is not None,
    )  # fmt: skip
    return both(s_and_b, x_and_a, need_B=need_B)


def both(s_and_b: GradSB, x_and_a: GradXA, *, need_B: bool) -> Backward:
    """What computes dS and dB, then dX and dA, and sums their partial results in one launch."""
    of_a, of_b, of_both = Ready(sum_partials), Ready(sum_partials), Ready(sum_two_partials)

    def run(
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor,
        s: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ds, db, db_partial = s_and_b(dy, s, lora_B)
        dx, da, da_partial = x_and_a(dy, weight, ds, lora_A, mask, x)
        sum_b = need_B and db_partial is not None
        if sum_b and da_partial is not None:
            of_both(db_partial, db, da_partial, da)
        elif sum_b:
            of_b(db_partial, db)
        elif da_partial is not None:
            of_a(da_partial, da)
        return dx, da, db if need_B else None

    return run


def grad_s_b(dy: Tensor, lora_B: Tensor, shape: Shape, target: Target, *, scale: float) -> GradSB:
    """dS and dB by a launch, at high ranks by library products."""
    (n, r), dtype = lora_B.shape, lora_B.dtype
    m = shape.m
    if r > kernels.MOST_RANKS_PER_READ:

        def by_library(dy: Tensor, s: Tensor | None, lora_B: Tensor) -> tuple[Tensor, Tensor, None]:
            s, ds = dy.new_zeros(m, r) if s is None else s, dy.new_empty(m, r)
            with unrecorded(dy):
                torch.addmm(ds, dy, lora_B.to(dy.dtype), beta=0, alpha=scale, out=ds)
                return ds, (dy.t() @ s).to(dtype), None

        return by_library
    plan = plans.choose(kernels.LORA_GRAD_S_B, shape, dy.dtype, target)
    multiply, total = Ready(lora_grad_s_b, scale=scale, plan=plan), Ready(sum_partials)
    parts = cdiv(n, plan.tile.cols)

    def run(dy: Tensor, s: Tensor | None, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = dy.new_zeros(m, r) if s is None else s
        ds_partial = dy.new_empty(parts, m, r, dtype=torch.float32)
        db_partial = dy.new_empty(plan.splits, n, r, dtype=torch.float32)
        multiply(dy, s, lora_B, ds_partial, db_partial)
        ds = dy.new_empty(m, r)
        total(ds_partial, ds)
        return ds, dy.new_empty(n, r, dtype=dtype), db_partial

    return run


def grad_x_a(
    dy: Tensor,
    lora_A: Tensor | None,
    shape: Shape,
    target: Target,
    choice: Choice,
    *,
    need_x: bool,
    need_A: bool,
) -> GradXA:
    """What computes those of dX and dA that are needed: both in one launch, unless a library product is."""
    if choice.path == "epilogue" and need_x:
        return _epilogue_grad_x_a(dy, lora_A, shape, target, choice, need_A=need_A)
    if need_A and lora_A is not None:
        make = _fused_grad_x_a if need_x else grad_a
        return make(dy, lora_A.dtype, shape, target, choice)
    return _grad_x(dy, shape, target) if need_x else lambda *_: (None, None, None)


def _fused_grad_x_a(dy: Tensor, dtype: torch.dtype, shape: Shape, target: Target, choice: Choice) -> GradXA:
    """dX and dA by one launch."""
    m, k, r = shape.m, shape.k, shape.r
    # a tile is measured for both gradients together
    plan = plans.choose(kernels.LORA_GRAD_X_A, shape, dy.dtype, target, tile=choice.tile)
    if plan.tile.persistent:
        multiply = Ready(lora_grad_x_a_persistent, plan=plan, multiprocessors=target.multiprocessors)
    else:
        multiply = Ready(lora_grad_x_a, plan=plan)

    def run(
        dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, mask: Tensor | None, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, da = dy.new_empty(m, k), dy.new_empty(r, k, dtype=dtype)
        da_partial = dy.new_empty(plan.splits, r, k, dtype=torch.float32)
        multiply(dy, weight, ds, lora_A, mask, x, dx, da_partial)
        return dx, da, da_partial

    return run


def _grad_x(dy: Tensor, shape: Shape, target: Target) -> GradXA:
    """dX alone by a launch."""
    m, k = shape.m, shape.k
    multiply = Ready(lora_grad_x, plan=plans.choose(kernels.LORA_GRAD_X, shape, dy.dtype, target))

    def run(
        dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, mask: Tensor | None, x: Tensor | None
    ) -> tuple[Tensor, None, None]:
        dx = dy.new_empty(m, k)
        multiply(dy, weight, ds, lora_A, mask, dx)
        return dx, None, None

    return run


def grad_a(dy: Tensor, dtype: torch.dtype, shape: Shape, target: Target, _: Choice) -> GradXA:
    """dA alone by a launch."""
    k, r = shape.k, shape.r
    plan = plans.choose(kernels.LORA_GRAD_A, shape, dy.dtype, target)
    multiply = Ready(lora_grad_a, plan=plan)

    def run(
        dy: Tensor, weight: Tensor | None, ds: Tensor, lora_A: Tensor, mask: Tensor | None, x: Tensor
    ) -> tuple[None, Tensor, Tensor]:
        da = dy.new_empty(r, k, dtype=dtype)
        da_partial = dy.new_empty(plan.splits, r, k, dtype=torch.float32)
        multiply(x, ds, mask, da_partial)
        return None, da, da_partial

    return run


def _epilogue_grad_x_a(
    dy: Tensor, lora_A: Tensor | None, shape: Shape, target: Target, choice: Choice, *, need_A: bool
) -> GradXA:
    """What computes dX by a library product, to which mask ⊙ (dS·A) is added, and dA by its own kernel."""
    aligned = in_wide_words(shape.k)
    add = add_low_rank(shape, dy.dtype, target, transposed=False, aligned=aligned)
    a_alone = grad_x_a(dy, lora_A, shape, target, choice, need_x=False, need_A=need_A)

    def run(
        dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, mask: Tensor | None, x: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dx = dy.new_empty(shape.m, shape.k)
        with unrecorded(dy):
            torch.mm(dy, weight, out=dx)
        add(ds, lora_A, mask, dx)
        return dx, *a_alone(dy, None, ds, lora_A, mask, x)[1:]

    return run
