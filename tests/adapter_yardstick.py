"""The yardstick of the adapter op: float64 is the truth, eager's error at the same dtype the tolerance."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from tests.lora_yardstick import assert_close

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

    def to(self, dtype: torch.dtype) -> "Case":
        """The same case in another dtype, parameters too."""
        residual = None if self.residual is None else self.residual.to(dtype)
        parameters = [p.to(dtype) for p in self.parameters]
        return replace(
            self, h=self.h.to(dtype), parameters=parameters, dout=self.dout.to(dtype), residual=residual
        )

    @property
    def inputs(self) -> list[Tensor]:
        """Everything that gets a gradient."""
        return [self.h, *self.parameters, *([] if self.residual is None else [self.residual])]


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


def assert_as_exact_as_eager(run: Callable[[Case], list[Tensor]], *cases: Case) -> None:
    """Each result's error against float64, over all cases together, is within the factor of eager's own.

    A result of one number wants several cases of one shape: eager's single error may be zero by luck.
    """
    got = _stacked([run(case) for case in cases])
    exact, theirs = (_stacked([eager(c) for c in of]) for of in ([c.to(torch.float64) for c in cases], cases))
    assert len(got) == len(exact)
    for name, value, truth, expected in zip(NAMES, got, exact, theirs, strict=False):
        assert value.shape == truth.shape, name
        assert value.dtype == expected.dtype, name
        assert_close(name, value, expected, truth)


def _stacked(runs: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(results) for results in zip(*runs, strict=True)]
