"""The ``triton`` backend of adapter: allocates, asks the plan for tiles, launches the kernels.

Tensors are 2-D: h ``[M, H]``, down_weight ``[D, H]``, up_weight ``[H, D]``, z ``[M, D]``.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.decide import is_aligned
from fastlora.ops.keep_mask import drop_threshold, keep_probability
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import contiguous, row_major, unrecorded
from fastlora_kernels import targets
from fastlora_kernels.adapter import kernels
from fastlora_kernels.adapter.backward import adapter_grad_h_weights, adapter_grad_z
from fastlora_kernels.adapter.forward import adapter_down, adapter_forward, adapter_up
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.launch import Ready
from fastlora_kernels.partials import sum_four_partials
from fastlora_kernels.tile import Plan, Shape

# dh, dW_d, db_d, dW_u and db_u, those that are needed
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# dh, those of the down-projection and of the up-projection, from dOut, h, dz, act(z) and down_weight
_GradHWeights = Callable[..., tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]]
# out and z
_Forward = Callable[..., tuple[Tensor, Tensor]]


@prepared(row_major, contiguous, contiguous, contiguous, contiguous, row_major)
def forward(
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
) -> _Forward:
    """out = residual + dropout(act(z))·W_uᵀ + b_u, and z."""
    size = down_weight.shape[0]
    aligned = is_aligned(*(t for t in (h, residual) if t is not None))
    settings = {
        "activation": activation,
        "drop_threshold": drop_threshold(dropout),
        "scale": 1 / keep_probability(dropout),
    }
    make = _in_one_launch if kernels.one_launch(size) else _in_two_launches
    return make(h, size, aligned, settings)


def _in_one_launch(h: Tensor, size: int, aligned: bool, settings: dict[str, Any]) -> _Forward:
    m, hidden = h.shape
    whole = Ready(adapter_forward, **settings, plan=_plan(kernels.ADAPTER_FORWARD, h, size, aligned))

    def run(h: Tensor, *more: Tensor | None) -> tuple[Tensor, Tensor]:
        z, out = h.new_empty(m, size), h.new_empty(m, hidden)
        whole(h, *more, z, out)
        return out, z

    return run


def _in_two_launches(h: Tensor, size: int, aligned: bool, settings: dict[str, Any]) -> _Forward:
    m, hidden = h.shape
    down = Ready(adapter_down, **settings, plan=_plan(kernels.ADAPTER_DOWN, h, size, aligned))
    up = Ready(adapter_up, plan=_plan(kernels.ADAPTER_UP, h, size, aligned))

    def run(
        h: Tensor,
        down_weight: Tensor,
        down_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        z, active, out = h.new_empty(m, size), h.new_empty(m, size), h.new_empty(m, hidden)
        down(h, down_weight, down_bias, seed, z, active)
        up(active, up_weight, up_bias, residual, out)
        return out, z

    return run


@prepared(row_major, row_major, contiguous, contiguous, contiguous)
def backward(
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
) -> Callable[..., Gradients]:
    """dz and act(z) from one read of dOut; dh and the four parameters' gradients from one more, and of h.

    Where h needs no gradient, dOut is read once more for the sum that is the up-projection bias's.
    """
    m, size = dout.shape[0], z.shape[1]
    aligned = is_aligned(*(t for t in (dout, h) if t is not None))
    of_z = Ready(
        adapter_grad_z,
        activation=activation,
        scale=1 / keep_probability(dropout),
        plan=_plan(kernels.ADAPTER_GRAD_Z, dout, size, aligned),
    )
    if need_down or need_up:
        of_rest: _GradHWeights = _grad_h_weights(
            dout, down_weight, up_weight, aligned, add_input=add_input, need_h=need_h
        )
    else:
        of_rest = functools.partial(_grad_h, add_input=add_input)

    def run(dout: Tensor, h: Tensor | None, z: Tensor, down_weight: Tensor, up_weight: Tensor) -> Gradients:
        dz, active = z.new_empty(m, size), z.new_empty(m, size)
        of_z(dout, z, up_weight, dz, active)
        # without need_down h was not kept; anything of its shape will do, its gradient is thrown away
        dh, of_down, of_up = of_rest(dout, dout if h is None else h, dz, active, down_weight)
        return dh, *(of_down if need_down else (None, None)), *(of_up if need_up else (None, None))

    return run


def _grad_h_weights(
    dout: Tensor, down_weight: Tensor, up_weight: Tensor, aligned: bool, *, add_input: bool, need_h: bool
) -> _GradHWeights:
    """What computes dh, if needed, and all parameters' gradients in one launch, and sums these in one."""
    (m, hidden), size = dout.shape, down_weight.shape[0]
    plan = _plan(kernels.ADAPTER_GRAD_H_WEIGHTS, dout, size, aligned)
    of_h_weights = Ready(adapter_grad_h_weights, add_input=add_input, plan=plan)
    total = Ready(sum_four_partials)
    # dW_u, dW_d, db_u and db_d, as the kernel has them one after the other
    of_up, of_down = up_weight.dtype, down_weight.dtype
    each = (((hidden, size), of_up), ((size, hidden), of_down), ((hidden,), of_up), ((size,), of_down))
    elements = 2 * hidden * size + hidden + size

    def run(
        dout: Tensor, h: Tensor, dz: Tensor, active: Tensor, down_weight: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        dh = dout.new_empty(m, hidden) if need_h else None
        partial = dout.new_empty(plan.splits, elements, dtype=torch.float32)
        of_h_weights(dout, h, dz, active, down_weight if need_h else None, dh, partial)
        grads = [dout.new_empty(shape, dtype=dtype) for shape, dtype in each]
        total(partial, *grads)
        d_up_weight, d_down_weight, d_up_bias, d_down_bias = grads
        return dh, (d_down_weight, d_down_bias), (d_up_weight, d_up_bias)

    return run


def _plan(kernel: Kernel, rows: Tensor, size: int, aligned: bool) -> Plan:
    m, hidden = rows.shape
    shape = Shape(m=m, n=hidden, k=hidden, r=size, aligned=aligned)
    return plans.choose(kernel, shape, rows.dtype, targets.detect(rows.device))


def _grad_h(
    dout: Tensor, h: Tensor, dz: Tensor, active: Tensor, down_weight: Tensor, *, add_input: bool
) -> tuple[Tensor, tuple[()], tuple[()]]:
    # frozen parameters: dh alone is a single library product
    with unrecorded(dz):
        dh = dz @ down_weight.to(dz.dtype)
        return dh.add_(dout) if add_input else dh, (), ()
