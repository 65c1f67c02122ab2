"""The ``torch`` backend of dora_linear: what it does beside lora_linear's, some rows at a time.

Tensors are 2-D: x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, factor ``[N]``.
"""

import torch
from torch import Tensor

from fastlora.ops import lora_torch
from fastlora.ops.lora_torch import ELEMENTS_PER_BLOCK, row_blocks


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
) -> tuple[Tensor, Tensor | None]:
    """Fill y = factor ⊙ U + bias and, if given, the product U = x·Wᵀ + S·Bᵀ; S and the dropout mask."""
    whole = y if product is None else product
    kept = lora_torch.forward(x, weight, None, lora_A, lora_B, seed, whole, scaling=scaling, dropout=dropout)
    # in the factor's float32, so that it is rounded once
    for rows, y_rows in row_blocks(whole, y):
        scaled = rows * factor
        y_rows.copy_(scaled if bias is None else scaled.add_(bias))
    return kept


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ of every row ``[N]``, some rows at a time."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = lora_A.to(wide), lora_B.to(wide)
    norm = weight.new_empty(weight.shape[0], dtype=wide)
    # an accelerator takes more at a time, for fewer launches
    step = max(64, ELEMENTS_PER_BLOCK * (1 if weight.is_cpu else 16) // max(weight.shape[1], 1))
    for w_rows, b_rows, out in zip(weight.split(step), b.split(step), norm.split(step), strict=True):
        torch.linalg.vector_norm(torch.addmm(w_rows.to(wide), b_rows, a, alpha=scaling), dim=1, out=out)
    return norm


def grad_product(dy: Tensor, product: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """dU = factor ⊙ dY, and Σ_m dY ⊙ U where U is given."""
    dproduct = dy.new_empty(dy.shape)
    dfactor = None if product is None else torch.zeros_like(factor)
    # without a product the second of the two is not looked at
    for dy_rows, product_rows, out in row_blocks(dy, dy if product is None else product, dproduct):
        block = dy_rows.to(factor.dtype)
        torch.mul(block, factor, out=out)
        if dfactor is not None:
            dfactor += (block * product_rows).sum(0)
    return dproduct, dfactor
