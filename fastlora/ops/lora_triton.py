"""The ``triton`` backend of lora_linear: prepares the launches of a call by the plan, then only launches.

Tensors are 2-D: x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, S ``[M, R]``. S
carries the factor scaling / (1 - p), applied in float32, and so does dS: nothing else has to scale.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import kernel_paths, lora_torch
from fastlora.ops.decide import Paths, in_wide_words, is_aligned
from fastlora.ops.keep_mask import drop_threshold, empty_keep_mask, keep_probability
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import contiguous, row_major, unrecorded
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.launch import Ready
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
from fastlora_kernels.tile import Shape, Tile, cdiv

# computes S and, with a seed, the mask, filling y, from x, weight, bias, lora_A, lora_B, seed and y
Forward = Callable[..., tuple[Tensor, Tensor | None]]
# computes S and, with a seed, the mask from x, lora_A and seed
Down = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@prepared(row_major, row_major, contiguous, contiguous, contiguous)
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
    paths: Paths | None,
) -> Forward:
    """Fill y = x·Wᵀ + bias + S·Bᵀ; S = scaling/(1 - p) · dropout(x)·Aᵀ and, with a seed, the dropout mask."""
    shape, target = shape_of(x, weight, lora_A, y), targets.detect(x.device)
    choice = choice_of("forward", paths, shape, x, dropping=seed is not None)
    if choice.path == "library":
        # it would draw another mask
        assert seed is None
        return _library_forward(scaling)
    if choice.path == "single":
        return _single_forward(x, shape, target, scaling=scaling, tile=choice.tile)
    s_and_mask = down(x, seed, shape, target, scaling=scaling, dropout=dropout)
    if choice.path == "epilogue":
        return _epilogue_forward(s_and_mask, x.dtype, shape, target)
    return _split_forward(s_and_mask, x, shape, target, choice.tile)


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


def _library_forward(scaling: float) -> Forward:
    def run(*layer: Any) -> tuple[Tensor, Tensor | None]:
        with unrecorded(layer[0]):
            return lora_torch.forward(*layer, scaling=scaling, dropout=0.0)

    return run


def _single_forward(x: Tensor, shape: Shape, target: Target, *, scaling: float, tile: Tile | None) -> Forward:
    """Everything in one launch."""
    plan = plans.choose(kernels.LORA_FORWARD_SINGLE, shape, x.dtype, target, tile=tile)
    whole = Ready(lora_forward_single, scale=scaling, plan=plan)

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, y: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        s = x.new_empty(shape.m, shape.r)
        whole(x, weight, bias, a, b, s, y)
        return s, None

    return run


def _split_forward(s_and_mask: Down, x: Tensor, shape: Shape, target: Target, tile: Tile | None) -> Forward:
    """S first, then y."""
    plan = plans.choose(kernels.LORA_FORWARD, shape, x.dtype, target, tile=tile)
    if plan.tile.persistent:
        up = Ready(lora_forward_persistent, plan=plan, multiprocessors=target.multiprocessors)
    else:
        up = Ready(lora_forward, plan=plan)
    absent = () if plan.tile.persistent else (None, None)

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, y: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        s, mask = s_and_mask(x, a, seed)
        up(x, weight, bias, s, b, y, *absent)
        return s, mask

    return run


def _epilogue_forward(s_and_mask: Down, dtype: torch.dtype, shape: Shape, target: Target) -> Forward:
    """A library product into y, to which S·Bᵀ is added."""
    add = _add_low_rank(shape.n, shape, dtype, target, transposed=True)

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, y: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        s, mask = s_and_mask(x, a, seed)
        with unrecorded(x):
            if bias is None:
                torch.mm(x, weight.t(), out=y)
            else:
                torch.addmm(bias, x, weight.t(), out=y)
        add(s, b, None, y)
        return s, mask

    return run


def down(
    x: Tensor, seed: Tensor | None, shape: Shape, target: Target, *, scaling: float, dropout: float
) -> Down:
    """What computes S and, with a seed, the dropout mask."""
    plan = plans.choose(kernels.LORA_DOWN, shape, x.dtype, target)
    scale, threshold = scaling / keep_probability(dropout), drop_threshold(dropout)
    multiply = Ready(lora_down, drop_threshold=threshold, scale=scale, plan=plan)
    total = Ready(sum_partials)

    def run(x: Tensor, lora_A: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mask = None if seed is None else empty_keep_mask("triton", shape.m, x)
        s = x.new_empty(shape.m, shape.r)
        if plan.splits == 1:
            multiply(x, lora_A, seed, mask, s)
            return s, mask
        s_partial = x.new_empty(plan.splits, shape.m, shape.r, dtype=torch.float32)
        multiply(x, lora_A, seed, mask, s_partial)
        total(s_partial, s)
        return s, mask

    return run


def _add_low_rank(
    columns: int, shape: Shape, dtype: torch.dtype, target: Target, *, transposed: bool
) -> Ready:
    # a new matrix [m, columns] is read and written here, x and the weight are not
    shape = replace(shape, aligned=in_wide_words(columns))
    return Ready(lora_add, transposed=transposed, plan=plans.choose(kernels.LORA_ADD, shape, dtype, target))


# computes dX, dA and dB from dy, x, weight, lora_A, lora_B, S and the mask
Backward = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


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
        return _library_backward(scaling, need_x=need_x, need_A=need_A, need_B=need_B)
    s_and_b = _grad_s_b(dy, lora_B, shape, target, scale=scaling / keep_probability(dropout))
    needs = {"need_x": need_x and lora_A is not None, "need_A": need_A and lora_A is not None}
    x_and_a = _grad_x_a(dy, lora_A, shape, target, choice, **needs)
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


def _library_backward(scaling: float, **needs: Any) -> Backward:
    def run(*kept: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with unrecorded(kept[0]):
            return lora_torch.backward(*kept, scaling=scaling, dropout=0.0, **needs)

    return run


def _grad_s_b(
    dy: Tensor, lora_B: Tensor, shape: Shape, target: Target, *, scale: float
) -> Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
    """What computes dS, dB and, where dB has still to be summed, its partial results, from dY, S and B."""
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


# computes dX, dA and dA's partial results, which have still to be summed, from dY, W, dS, A, the mask and x
_GradXA = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def _grad_x_a(
    dy: Tensor,
    lora_A: Tensor | None,
    shape: Shape,
    target: Target,
    choice: Choice,
    *,
    need_x: bool,
    need_A: bool,
) -> _GradXA:
    """What computes those of dX and dA that are needed: both in one launch, unless a library product is."""
    m, k, r, dtype = shape.m, shape.k, shape.r, None if lora_A is None else lora_A.dtype
    if choice.path == "epilogue" and need_x:
        return _epilogue_grad_x_a(dy, lora_A, shape, target, choice, need_A=need_A)
    if not (need_x or need_A):
        return lambda *_: (None, None, None)
    # a tile is measured for both gradients together
    kernel, tile = (
        (kernels.LORA_GRAD_X_A, choice.tile) if need_x and need_A
        else (kernels.LORA_GRAD_X if need_x else kernels.LORA_GRAD_A, None)
    )  # fmt: skip
    plan = plans.choose(kernel, shape, dy.dtype, target, tile=tile)
    if plan.tile.persistent:
        both = Ready(lora_grad_x_a_persistent, plan=plan, multiprocessors=target.multiprocessors)
    else:
        both = Ready(lora_grad_x_a, plan=plan)
    x_alone, a_alone = Ready(lora_grad_x, plan=plan), Ready(lora_grad_a, plan=plan)

    def run(
        dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, mask: Tensor | None, x: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dx = dy.new_empty(m, k) if need_x else None
        da = dy.new_empty(r, k, dtype=dtype) if need_A else None
        da_partial = dy.new_empty(plan.splits, r, k, dtype=torch.float32) if need_A else None
        if need_x and need_A:
            both(dy, weight, ds, lora_A, mask, x, dx, da_partial)
        elif need_x:
            x_alone(dy, weight, ds, lora_A, mask, dx)
        else:
            a_alone(x, ds, mask, da_partial)
        return dx, da, da_partial

    return run


def _epilogue_grad_x_a(
    dy: Tensor, lora_A: Tensor | None, shape: Shape, target: Target, choice: Choice, *, need_A: bool
) -> _GradXA:
    """What computes dX by a library product, to which mask ⊙ (dS·A) is added, and dA by its own kernel."""
    add = _add_low_rank(shape.k, shape, dy.dtype, target, transposed=False)
    a_alone = _grad_x_a(dy, lora_A, shape, target, choice, need_x=False, need_A=need_A)

    def run(
        dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, mask: Tensor | None, x: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dx = dy.new_empty(shape.m, shape.k)
        with unrecorded(dy):
            torch.mm(dy, weight, out=dx)
        add(ds, lora_A, mask, dx)
        return dx, *a_alone(dy, None, ds, lora_A, mask, x)[1:]

    return run
