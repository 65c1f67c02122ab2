"""The ``triton`` backend of dora_linear: what its kernels do beside lora_linear's.

Tensors are 2-D: x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, factor ``[N]``.
"""

import torch
from torch import Tensor

from fastlora.ops import dora_torch
from fastlora.ops.decide import Paths, is_aligned
from fastlora.ops.lora_triton import choice_of, down, shape_of
from fastlora.ops.runtime import current_device, row_major
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.dora import dora_grad_product, dora_weight_norm
from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.partials import sum_partials
from fastlora_kernels.tile import Shape


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    factor: Tensor,
    *,
    scaling: float,
    dropout: float,
    y: Tensor,
    product: Tensor | None,
    paths: Paths | None,
) -> tuple[Tensor, Tensor | None]:
    """Fill y = factor ⊙ U + bias and, if given, the product U = x·Wᵀ + S·Bᵀ; S and the dropout mask."""
    x, weight, lora_A, lora_B = row_major(x), row_major(weight), lora_A.contiguous(), lora_B.contiguous()
    shape, target = shape_of(x, weight, lora_A, y), targets.detect(x.device)
    choice = choice_of("forward", paths, shape, x, dropping=seed is not None, dora=True)
    if choice.path == "library":
        layer = (x, weight, bias, lora_A, lora_B)
        return dora_torch.forward(*layer, None, factor, scaling=scaling, dropout=0.0, y=y, product=product)
    with current_device(x):
        s, mask = down(x, lora_A, seed, shape, target, scaling=scaling, dropout=dropout)
        plan = plans.choose(kernels.DORA_FORWARD, shape, x.dtype, target, tile=choice.tile)
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
    """dU = factor ⊙ dY, and Σ_m dY ⊙ U where U is given."""
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
