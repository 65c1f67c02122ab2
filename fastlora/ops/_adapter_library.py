"""adapter's registration with ``torch.library``: schema, implementation and fake, so that it compiles."""

from typing import Protocol

import torch
from torch import Tensor

from fastlora.ops import adapter_torch
from fastlora.ops._autocast import unrecorded
from fastlora.ops.runtime import register, rows_of, runs_directly, without_none

Gradients = tuple[Tensor | None, ...]
_FORWARD_SCHEMA = (
    "adapter_forward(Tensor h, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    "Tensor? residual, Tensor? seed, bool add_input, str activation, float dropout, str backend) "
    "-> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "adapter_backward(Tensor dout, Tensor? h, Tensor z, Tensor down_weight, Tensor up_weight, "
    "bool add_input, str activation, float dropout, bool need_h, bool need_down, bool need_up, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Implementation(Protocol):
    """What a backend's module offers. Tensors are 2-D with h ``[M, H]``, weights ``[D, H]`` and ``[H, D]``.

    z ``[M, D]``, the input of the activation, is all that is kept beside h. Where dropout struck, it holds a
    value at which the activation and its slope are 0, so that no mask is needed.
    """

    def forward(
        self,
        h: Tensor,
        down_weight: Tensor,
        down_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        *,
        activation: str,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        """out ``[M, H]`` and z."""

    def backward(
        self,
        dout: Tensor,
        h: Tensor | None,
        z: Tensor,
        down_weight: Tensor,
        up_weight: Tensor,
        *,
        add_input: bool,
        activation: str,
        dropout: float,
        need_h: bool,
        need_down: bool,
        need_up: bool,
    ) -> tuple[Tensor | None, ...]:
        """dh, dW_d, db_d, dW_u and db_u, those that are needed, a parameter's in its weight's dtype."""


def implementation(backend: str) -> Implementation:
    """The module behind a backend's name."""
    if backend == "torch":
        return adapter_torch
    # imported late: Triton is not installed everywhere
    from fastlora.ops import adapter_triton

    return adapter_triton


def adapter_forward(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    add_input: bool,
    activation: str,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out ``[..., H]`` and the kept z ``[M, D]``, for h ``[..., H]``; ``add_input`` adds h to the output."""
    run = _forward if runs_directly(backend, h, seed) else torch.ops.fastlora.adapter_forward
    result: tuple[Tensor, Tensor] = run(
        h, down_weight, down_bias, up_weight, up_bias, residual, seed, add_input, activation, dropout, backend
    )
    return result


def adapter_backward(
    dout: Tensor,
    h: Tensor | None,
    z: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    add_input: bool,
    activation: str,
    dropout: float,
    need_h: bool,
    need_down: bool,
    need_up: bool,
    backend: str,
) -> Gradients:
    """dh ``[..., H]``, dW_d, db_d, dW_u and db_u; an empty tensor or None for each that is not needed."""
    run = _backward if runs_directly(backend, dout) else torch.ops.fastlora.adapter_backward
    result: Gradients = run(
        dout,
        h,
        z,
        down_weight,
        up_weight,
        add_input,
        activation,
        dropout,
        need_h,
        need_down,
        need_up,
        backend,
    )
    return result


def _forward(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    add_input: bool,
    activation: str,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    added = h if add_input else residual
    with unrecorded(h):
        out, z = implementation(backend).forward(
            rows_of(h),
            down_weight,
            down_bias,
            up_weight,
            up_bias,
            None if added is None else rows_of(added),
            seed,
            activation=activation,
            dropout=dropout,
        )
    # not .view: autograd refuses in-place changes of a Function's output that is a view
    return out if h.dim() == 2 else torch.ops.aten._unsafe_view(out, h.shape), z


def _backward(
    dout: Tensor,
    h: Tensor | None,
    z: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    add_input: bool,
    activation: str,
    dropout: float,
    need_h: bool,
    need_down: bool,
    need_up: bool,
    backend: str,
) -> Gradients:
    with unrecorded(dout):
        dh, *of_parameters = implementation(backend).backward(
            rows_of(dout),
            None if h is None else rows_of(h),
            z,
            down_weight,
            up_weight,
            add_input=add_input,
            activation=activation,
            dropout=dropout,
            need_h=need_h,
            need_down=need_down,
            need_up=need_up,
        )
    return None if dh is None else dh.view(dout.shape), *of_parameters


def _fake_forward(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    add_input: bool,
    activation: str,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    return out, h.new_empty(rows_of(h).shape[0], down_weight.shape[0])


def _fake_backward(
    dout: Tensor,
    h: Tensor | None,
    z: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    add_input: bool,
    activation: str,
    dropout: float,
    need_h: bool,
    need_down: bool,
    need_up: bool,
    backend: str,
) -> Gradients:
    def gradient(needed: bool, weight: Tensor, *shape: int) -> Tensor:
        return weight.new_empty(shape) if needed else dout.new_empty(0)

    size, hidden = down_weight.shape
    return (
        dout.new_empty(dout.shape) if need_h else dout.new_empty(0),
        gradient(need_down, down_weight, size, hidden),
        gradient(need_down, down_weight, size),
        gradient(need_up, up_weight, hidden, size),
        gradient(need_up, up_weight, hidden),
    )


register(_FORWARD_SCHEMA, _forward, _fake_forward)
register(_BACKWARD_SCHEMA, without_none(_backward), _fake_backward)
