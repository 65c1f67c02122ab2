"""Cases of the adapter op, and eager's results and gradients for them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from tests.exactness import assert_as_exact

NAMES = ("out", "dh", "dW_d", "db_d", "dW_u", "db_u", "d residual")


@dataclass
class Case:
    """The tensors of one call; ``residual`` None means the input; ``keep`` is the dropout mask, if any."""

    h: Tensor
    parameters: list[Tensor]
    dout: Tensor
    residual: Tensor | None = None
    activation: str = "gelu"
    keep: Tensor | None = None
    keep_probability: float = 1.0

    @property
    def inputs(self) -> list[Tensor]:
        """Everything that gets a gradient."""
        return [self.h, *self.parameters, *([] if self.residual is None else [self.residual])]

    def holding(self, tensors: list[Tensor]) -> "Case":
        """The same case with other :attr:`inputs`, and another ``dout`` as the last one."""
        h, *parameters, dout = tensors
        residual = None if self.residual is None else parameters.pop()
        return replace(self, h=h, parameters=parameters, dout=dout, residual=residual)


def make_case(
    m: int,
    hidden: int,
    size: int,
    dtype: torch.dtype,
    *,
    parameters: torch.dtype | None = None,
    separate_residual: bool = False,
    activation: str = "gelu",
    device: torch.device | str = "cpu",
) -> Case:
    """Random tensors of a layer's usual scale."""

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape) * scale).to(device, of)

    of = parameters or dtype
    return Case(
        h=draw(m, hidden),
        parameters=[
            draw(size, hidden, scale=hidden**-0.5, of=of),
            draw(size, of=of),
            draw(hidden, size, scale=size**-0.5, of=of),
            draw(hidden, of=of),
        ],
        dout=draw(m, hidden),
        residual=draw(m, hidden) if separate_residual else None,
        activation=activation,
    )


def eager(case: Case) -> list[Tensor]:
    """Output and gradients of the reference in the case's own dtypes."""
    if case.keep is None:
        return outputs_and_gradients(reference.adapter, case)

    with_mask: Any = functools.partial(
        reference.adapter_with_mask, keep_mask=case.keep, keep_probability=case.keep_probability
    )
    return outputs_and_gradients(with_mask, case)


def outputs_and_gradients(forward: Callable[..., Tensor], case: Case) -> list[Tensor]:
    """Output and gradients of ``forward(h, *parameters, residual=…, activation=…)`` at the case's inputs."""
    inputs = [t.detach().requires_grad_() for t in case.inputs]
    residual = "input" if case.residual is None else inputs[5]
    out = forward(*inputs[:5], residual=residual, activation=case.activation)
    return [out.detach(), *torch.autograd.grad(out, inputs, case.dout)]


def assert_as_exact_as_eager(run: Callable[[Case], list[Tensor]], case: Case) -> None:
    """Each result's error against float64 is within the factor of eager's own."""
    got = run(case)
    assert_as_exact(NAMES, got, lambda tensors: eager(case.holding(tensors)), [*case.inputs, case.dout])
