"""The forward pass of lora_linear's ``triton`` backend: its launches, prepared by the plan.

Tensors are 2-D: x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, S ``[M, R]``. S
carries the factor scaling / (1 - p), applied in float32, and so does dS: nothing else has to scale.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlora.ops import kernel_paths, lora_torch
from fastlora.ops.decide import Paths, is_aligned
from fastlora.ops.keep_mask import drop_threshold, empty_keep_mask, keep_probability
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import contiguous, row_major, unrecorded
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.launch import Ready
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.down import lora_down
from fastlora_kernels.lora.epilogue import lora_add
from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.lora.persistent import lora_forward_persistent
from fastlora_kernels.lora.single import lora_forward_single
from fastlora_kernels.partials import sum_partials
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, Tile

_T = TypeVar("_T")

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
        return by_library(lora_torch.forward, scaling=scaling, dropout=0.0)
    if choice.path == "single":
        return _single_forward(x, shape, target, scaling=scaling, tile=choice.tile)
    s_and_mask = down(x, seed, shape, target, scaling=scaling, dropout=dropout)
    up = _epilogue(shape, y, target) if choice.path == "epilogue" else _up(x, shape, target, choice.tile)

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, y: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        s, mask = s_and_mask(x, a, seed)
        up(x, weight, bias, s, b, y)
        return s, mask

    return run


@prepared(row_major, contiguous)
def make_s(x: Tensor, lora_A: Tensor, seed: Tensor | None, *, scaling: float, dropout: float) -> Down:
    """S = scaling/(1 - p) · dropout(x)·Aᵀ and, with a seed, the dropout mask: the first half of a call."""
    (m, k), r = x.shape, lora_A.shape[0]
    shape = Shape(m=m, n=r, k=k, r=r, aligned=is_aligned(x))
    return down(x, seed, shape, targets.detect(x.device), scaling=scaling, dropout=dropout)


@prepared(row_major, row_major, contiguous, contiguous, contiguous)
def fill_from_s(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    y: Tensor,
    *,
    paths: Paths | None,
) -> Callable[..., None]:
    """Fill y = x·Wᵀ + bias + S·Bᵀ, which may be columns of a wider matrix: the second half of a call."""
    (m, k), (n, r) = x.shape, lora_B.shape
    shape = Shape(m=m, n=n, k=k, r=r, aligned=is_aligned(x, weight, y))
    choice, target = choice_of("forward", paths, shape, x, dropping=True), targets.detect(x.device)
    if choice.path not in ("split", "epilogue"):
        # decided for a call that makes its own S: as with a mask, no such path is left
        in_graph = paths is None or paths.in_graph
        choice = kernel_paths.choose("forward", shape, x.dtype, x.device, dropping=True, in_graph=in_graph)
    if choice.path == "epilogue":
        return _epilogue(shape, y, target)
    assert choice.path == "split"
    return _up(x, shape, target, choice.tile)


def by_library(op: Callable[..., _T], **settings: Any) -> Callable[..., _T]:
    """An op of library products with these settings, of which autograd and autocast see nothing."""

    def run(*tensors: Any) -> _T:
        with unrecorded(tensors[0]):
            return op(*tensors, **settings)

    return run


def shape_of(x: Tensor, weight: Tensor, lora_A: Tensor, y: Tensor) -> Shape:
    """The sizes of a call on these tensors, and whether their rows can be read in wide words."""
    (m, k), n = x.shape, weight.shape[0]
    return Shape(m=m, n=n, k=k, r=lora_A.shape[0], aligned=is_aligned(x, weight, y))


def choice_of(
    part: Pass, paths: Paths | None, shape: Shape, x: Tensor, *, dropping: bool, dora: bool = False
) -> Choice:
    """What was decided; chosen now where it was left open, or for another shape: a part's, or not aligned."""
    if paths is not None and paths.shape == shape:
        return paths.forward if part == "forward" else paths.backward
    # left open where a compiled graph calls, or torch's dispatcher, which takes the host longer than launches
    in_graph = paths is None or paths.in_graph
    return kernel_paths.choose(
        part, shape, x.dtype, x.device, dropping=dropping, dora=dora, in_graph=in_graph
    )


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


def _up(x: Tensor, shape: Shape, target: Target, tile: Tile | None) -> Callable[..., None]:
    """What fills y from x, weight, bias, S, B and y."""
    plan = plans.choose(kernels.LORA_FORWARD, shape, x.dtype, target, tile=tile)
    if plan.tile.persistent:
        return Ready(lora_forward_persistent, plan=plan, multiprocessors=target.multiprocessors)
    fill = Ready(lora_forward, plan=plan)
    # neither factor nor product
    return lambda *tensors: fill(*tensors, None, None)


def _epilogue(shape: Shape, y: Tensor, target: Target) -> Callable[..., None]:
    """What fills y from x, weight, bias, S, B and y by a library product, to which S·Bᵀ is added."""
    add = add_low_rank(shape, y.dtype, target, transposed=True, aligned=is_aligned(y))

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, y: Tensor) -> None:
        with unrecorded(x):
            lora_torch.multiply(x, weight, bias, y)
        add(s, b, None, y)

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


def add_low_rank(
    shape: Shape, dtype: torch.dtype, target: Target, *, transposed: bool, aligned: bool
) -> Ready:
    """What adds left·right, or with ``transposed`` left·rightᵀ, to a matrix whose rows are ``aligned``."""
    # that matrix is read and written here, x and the weight are not
    shape = replace(shape, aligned=aligned)
    return Ready(lora_add, transposed=transposed, plan=plans.choose(kernels.LORA_ADD, shape, dtype, target))
