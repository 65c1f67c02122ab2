"""The ``triton`` backend of dora_linear: what its kernels do beside lora_linear's.

Tensors are 2-D: x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, factor ``[N]``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops import dora_torch
from fastlora.ops.decide import Paths, is_aligned
from fastlora.ops.lora_triton import Forward, by_library, choice_of, down, shape_of
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import contiguous, row_major
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.launch import Ready
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.dora import dora_grad_product, dora_weight_norm
from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.partials import sum_partials
from fastlora_kernels.tile import Shape


@prepared(row_major, row_major, contiguous, contiguous, contiguous, contiguous, contiguous)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    factor: Tensor,
    y: Tensor,
    product: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    paths: Paths | None,
) -> Forward:
    """Fill y = factor ⊙ U + bias and, if given, the product U = x·Wᵀ + S·Bᵀ; S and the dropout mask."""
    shape, target = shape_of(x, weight, lora_A, y), targets.detect(x.device)
    choice = choice_of("forward", paths, shape, x, dropping=seed is not None, dora=True)
    if choice.path == "library":
        return by_library(dora_torch.forward, scaling=scaling, dropout=0.0)
    s_and_mask = down(x, seed, shape, target, scaling=scaling, dropout=dropout)
    plan = plans.choose(kernels.DORA_FORWARD, shape, x.dtype, target, tile=choice.tile)
    up = Ready(lora_forward, plan=plan)

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        factor: Tensor,
        y: Tensor,
        product: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        s, mask = s_and_mask(x, lora_A, seed)
        up(x, weight, bias, s, lora_B, y, factor, product)
        return s, mask

    return run


@prepared(row_major, contiguous, contiguous)
def weight_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """‖W + s·B·A‖ of every row ``[N]``, in float32."""
    (n, k), r = weight.shape, lora_A.shape[0]
    shape = Shape(m=0, n=n, k=k, r=r, aligned=is_aligned(weight))
    plan = plans.choose(kernels.DORA_WEIGHT_NORM, shape, weight.dtype, targets.detect(weight.device))
    fill = Ready(dora_weight_norm, scale=scaling, plan=plan)

    def run(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        norm = weight.new_empty(n, dtype=torch.float32)
        fill(weight, lora_A, lora_B, norm)
        return norm

    return run


@prepared(row_major, contiguous, contiguous)
def grad_product(
    dy: Tensor, product: Tensor | None, factor: Tensor
) -> Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]]:
    """dU = factor ⊙ dY, and Σ_m dY ⊙ U where U is given."""
    m, n = dy.shape
    shape = Shape(m=m, n=n, k=0, r=1, aligned=is_aligned(dy))
    plan = plans.choose(kernels.DORA_GRAD_PRODUCT, shape, dy.dtype, targets.detect(dy.device))
    multiply, total = Ready(dora_grad_product, plan=plan), Ready(sum_partials)

    def run(dy: Tensor, product: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        dproduct = dy.new_empty(m, n)
        if product is None:
            multiply(dy, None, factor, dproduct, None)
            return dproduct, None
        partial = dy.new_empty(plan.splits, n, dtype=torch.float32)
        multiply(dy, product, factor, dproduct, partial)
        dfactor = torch.empty_like(factor)
        total(partial, dfactor)
        return dproduct, dfactor

    return run
