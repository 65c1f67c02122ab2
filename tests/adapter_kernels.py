"""What the kernels of the bottleneck adapter are launched with in tests: sizes, tensors, plans, outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.tile import Plan, Shape
from tests.kernel_harness import Harness


@dataclass(frozen=True)
class Size:
    """Rows m, hidden size h and bottleneck d; a bottleneck above 32 is cut into chunks in one kernel."""

    m: int
    h: int
    d: int

    def __str__(self) -> str:
        return f"m{self.m}-h{self.h}-d{self.d}"


BASE = Size(m=33, h=41, d=5)


def choose(kernel: Kernel, size: Size, dtype: torch.dtype, splits: int = 1) -> Plan:
    chosen = plans.choose(kernel, Shape(size.m, size.h, size.h, size.d), dtype, targets.DEFAULT)
    return Plan(chosen.tile, splits)


@dataclass
class Tensors:
    """h, the four parameters and a residual, between NaN; parameters in fp32 or the layer's dtype."""

    h: Tensor
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    residual: Tensor

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.down_weight, self.down_bias, self.up_weight, self.up_bias


def make(harness: Harness, size: Size, *, parameters: torch.dtype | None = None) -> Tensors:
    def vector(length: int) -> Tensor:
        return harness.random(1, length, dtype=parameters)[0]

    return Tensors(
        h=harness.random(size.m, size.h, padded=True),
        down_weight=harness.random(size.d, size.h, dtype=parameters),
        down_bias=vector(size.d),
        up_weight=harness.random(size.h, size.d, dtype=parameters),
        up_bias=vector(size.h),
        residual=harness.random(size.m, size.h, padded=True),
    )


def rounded(tensors: Tensors, dtype: torch.dtype) -> list[Tensor]:
    """The operands of a product: matrices in the layer's dtype, biases as they are."""
    return [
        tensors.h, tensors.down_weight.to(dtype), tensors.down_bias, tensors.up_weight.to(dtype),
        tensors.up_bias, tensors.residual,
    ]  # fmt: skip


def partial_sums(harness: Harness, size: Size, splits: int) -> Tensor:
    return harness.output(splits, 2 * size.h * size.d + size.h + size.d, dtype=torch.float32)


def sections(flat: Tensor, size: Size) -> list[Tensor]:
    """dW_u, dW_d, db_u and db_d out of the flat sums."""
    product = size.h * size.d
    up, down, up_bias, down_bias = flat.split([product, product, size.h, size.d])
    return [up.view(size.h, size.d), down.view(size.d, size.h), up_bias, down_bias]
