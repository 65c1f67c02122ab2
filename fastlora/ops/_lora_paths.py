"""The other paths of the ``triton`` backend: one launch, and library products with an epilogue."""

from dataclasses import replace

import torch
from torch import Tensor

from fastlora.ops._launch import is_aligned, row_major
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.epilogue import lora_add
from fastlora_kernels.lora.single import lora_forward_single
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, Tile


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
    _add(s, lora_B, None, y, shape, target, transposed=True)


def epilogue_grad_x(
    dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, mask: Tensor | None, shape: Shape, target: Target
) -> Tensor:
    """dX = dY·W by a library product, plus mask ⊙ (dS·A)."""
    dx = dy.new_empty(shape.m, shape.k)
    torch.mm(dy, row_major(weight), out=dx)
    _add(ds, lora_A.contiguous(), mask, dx, shape, target, transposed=False)
    return dx


def _add(
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
