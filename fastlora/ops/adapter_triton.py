"""The ``triton`` backend of adapter: allocates, asks the plan for tiles, launches the kernels.

Tensors are 2-D: h ``[M, H]``, down_weight ``[D, H]``, up_weight ``[H, D]``, z ``[M, D]``.
"""

from collections.abc import Callable

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
) -> Callable[..., tuple[Tensor, Tensor]]:
    """out = residual + dropout(act(z))·W_uᵀ + b_u, and z."""
    (m, hidden), size = h.shape, down_weight.shape[0]
    aligned = is_aligned(*(t for t in (h, residual) if t is not None))
    settings = {
        "activation": activation,
        "drop_threshold": drop_threshold(dropout),
        "scale": 1 / keep_probability(dropout),
    }
    if kernels.one_launch(size):
        whole = Ready(adapter_forward, **settings, plan=_plan(kernels.ADAPTER_FORWARD, h, size, aligned))

        def in_one(h: Tensor, *more: Tensor | None) -> tuple[Tensor, Tensor]:
            z, out = h.new_empty(m, size), h.new_empty(m, hidden)
            whole(h, *more, z, out)
            return out, z

        return in_one
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
    """dz and act(z) from one read of dOut; dh and the four parameters' gradients from one more, and of h."""
    (m, hidden), size = dout.shape, z.shape[1]
    aligned = is_aligned(*(t for t in (dout, h) if t is not None))
    of_z = Ready(
        adapter_grad_z,
        activation=activation,
        scale=1 / keep_probability(dropout),
        plan=_plan(kernels.ADAPTER_GRAD_Z, dout, size, aligned),
    )
    plan = _plan(kernels.ADAPTER_GRAD_H_WEIGHTS, dout, size, aligned)
    of_h_weights = Ready(adapter_grad_h_weights, add_input=add_input, plan=plan)
    total = Ready(sum_four_partials)
    # dW_u, dW_d, db_u and db_d, as the kernel has them one after the other
    of_up, of_down = up_weight.dtype, down_weight.dtype
    each = (((hidden, size), of_up), ((size, hidden), of_down), ((hidden,), of_up), ((size,), of_down))
    elements = 2 * hidden * size + hidden + size

    def run(dout: Tensor, h: Tensor | None, z: Tensor, down_weight: Tensor, up_weight: Tensor) -> Gradients:
        dz, active = z.new_empty(m, size), z.new_empty(m, size)
        of_z(dout, z, up_weight, dz, active)
        if not (need_down or need_up):
            return _grad_h(dout, dz, down_weight, add_input), None, None, None, None
        dh = dout.new_empty(m, hidden) if need_h else None
        partial = dout.new_empty(plan.splits, elements, dtype=torch.float32)
        # without need_down h was not kept; anything of its shape will do, its gradient is thrown away
        source, for_h = dout if h is None else h, down_weight if need_h else None
        of_h_weights(dout, source, dz, active, for_h, dh, partial)
        grads = [dout.new_empty(shape, dtype=dtype) for shape, dtype in each]
        total(partial, *grads)
        d_up_weight, d_down_weight, d_up_bias, d_down_bias = grads
        of_down = (d_down_weight, d_down_bias) if need_down else (None, None)
        return dh, *of_down, *((d_up_weight, d_up_bias) if need_up else (None, None))

    return run


def _plan(kernel: Kernel, rows: Tensor, size: int, aligned: bool) -> Plan:
    m, hidden = rows.shape
    shape = Shape(m=m, n=hidden, k=hidden, r=size, aligned=aligned)
    return plans.choose(kernel, shape, rows.dtype, targets.detect(rows.device))


def _grad_h(dout: Tensor, dz: Tensor, down_weight: Tensor, add_input: bool) -> Tensor:
    # frozen parameters: dh alone is a single library product
    with unrecorded(dz):
        dh = dz @ down_weight.to(dz.dtype)
        return dh.add_(dout) if add_input else dh
