"""Cases of the LoRA ops, and eager's results and gradients for them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastlora import reference
from tests.cases import cases
from tests.exactness import assert_as_exact

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# by default fp16 is tried beside fp32 adapters
EACH_DTYPE = pytest.mark.parametrize(
    "dtype", cases([torch.float32, torch.bfloat16], [torch.float16]), ids=str
)
NAMES = ("y", "dX", "dA", "dB")


@dataclass
class Case:
    """The tensors of one layer call; ``keep`` is the dropout mask, None without dropout."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    keep: Tensor | None = None
    keep_probability: float = 1.0
    scaling: float = 1.7

    @property
    def tensors(self) -> list[Tensor]:
        """Every number that the results depend on."""
        bias = [] if self.bias is None else [self.bias]
        return [self.x, self.weight, self.lora_a, self.lora_b, self.dy, *bias]

    def holding(self, tensors: list[Tensor]) -> "Case":
        """The same case with other :attr:`tensors`."""
        x, weight, lora_a, lora_b, dy, *bias = tensors
        return replace(
            self, x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, dy=dy, bias=bias[0] if bias else None
        )


def make_case(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Case:
    """Random tensors of a layer's usual scale."""

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape) * scale).to(device, of)

    return Case(
        x=draw(m, k),
        weight=draw(n, k, scale=max(k, 1) ** -0.5),
        bias=draw(n) if bias else None,
        lora_a=draw(r, k, scale=max(k, 1) ** -0.5, of=adapter_dtype or dtype),
        lora_b=draw(n, r, scale=max(r, 1) ** -0.5, of=adapter_dtype or dtype),
        dy=draw(m, n),
    )


def eager(case: Case) -> list[Tensor]:
    """y, dX, dA and dB of the reference in the case's own dtypes."""

    def forward(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        if case.keep is None:
            return reference.lora_linear(x, case.weight, case.bias, lora_a, lora_b, scaling=case.scaling)
        return reference.lora_linear_with_mask(
            x,
            case.weight,
            case.bias,
            lora_a,
            lora_b,
            case.keep,
            scaling=case.scaling,
            keep_probability=case.keep_probability,
        )

    return outputs_and_gradients(forward, case)


def outputs_and_gradients(forward: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case) -> list[Tensor]:
    """y, dX, dA and dB of ``forward(x, lora_A, lora_B)`` at the case's inputs."""
    inputs = [t.detach().requires_grad_() for t in (case.x, case.lora_a, case.lora_b)]
    y = forward(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, case.dy)]


def assert_as_exact_as_eager(got: list[Tensor], case: Case) -> dict[str, float]:
    """Each result's error against float64 is at most FACTOR times eager's own; returns the ratios."""
    return assert_as_exact(NAMES, got, lambda tensors: eager(case.holding(tensors)), case.tensors)


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """Bool keep mask out of either backend's stored form."""
    if mask.dtype == torch.int8:
        return mask != 0
    # even columns in the lower half of a word, odd ones in the upper
    column = torch.arange(32, device=mask.device)
    bits = (mask[:, :, None] >> (column // 2 + column % 2 * 16)) & 1
    return bits.flatten(1)[:, :columns].bool()
