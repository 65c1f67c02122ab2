"""The ``triton`` backend of adapter: allocates, asks the plan for tiles, launches the kernels.

Tensors are 2-D: h ``[M, H]``, down_weight ``[D, H]``, up_weight ``[H, D]``, z ``[M, D]``.
"""

import torch
from torch import Tensor

from fastlora.ops.decide import is_aligned
from fastlora.ops.keep_mask import drop_threshold, keep_probability
from fastlora.ops.runtime import current_device, row_major
from fastlora_kernels import targets
from fastlora_kernels.adapter import kernels
from fastlora_kernels.adapter.backward import adapter_grad_h_weights, adapter_grad_z
from fastlora_kernels.adapter.forward import adapter_down, adapter_forward, adapter_up
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.partials import sum_four_partials
from fastlora_kernels.tile import Plan, Shape


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
) -> tuple[Tensor, Tensor]:
    """out = residual + dropout(act(z))·W_uᵀ + b_u, and z."""
    h, residual = row_major(h), None if residual is None else row_major(residual)
    down_weight, up_weight = down_weight.contiguous(), up_weight.contiguous()
    size = down_weight.shape[0]
    aligned = is_aligned(*(t for t in (h, residual) if t is not None))
    threshold, scale = drop_threshold(dropout), 1 / keep_probability(dropout)
    z, out = h.new_empty(h.shape[0], size), torch.empty_like(h, memory_format=torch.contiguous_format)
    with current_device(h):
        if kernels.one_launch(size):
            adapter_forward(
                h,
                down_weight,
                down_bias,
                up_weight,
                up_bias,
                residual,
                seed,
                z,
                out,
                activation=activation,
                drop_threshold=threshold,
                scale=scale,
                plan=_plan(kernels.ADAPTER_FORWARD, h, size, aligned),
            )
            return out, z
        active = torch.empty_like(z)
        adapter_down(
            h,
            down_weight,
            down_bias,
            seed,
            z,
            active,
            activation=activation,
            drop_threshold=threshold,
            scale=scale,
            plan=_plan(kernels.ADAPTER_DOWN, h, size, aligned),
        )
        adapter_up(
            active, up_weight, up_bias, residual, out, plan=_plan(kernels.ADAPTER_UP, h, size, aligned)
        )
    return out, z


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
) -> tuple[Tensor | None, ...]:
    """dz and act(z) from one read of dOut; dh and the four parameters' gradients from one more, and of h."""
    dout = row_major(dout)
    down_weight, up_weight = down_weight.contiguous(), up_weight.contiguous()
    aligned = is_aligned(*(t for t in (dout, h) if t is not None))
    dz, active = torch.empty_like(z), torch.empty_like(z)
    with current_device(dout):
        adapter_grad_z(
            dout,
            z,
            up_weight,
            dz,
            active,
            activation=activation,
            scale=1 / keep_probability(dropout),
            plan=_plan(kernels.ADAPTER_GRAD_Z, dout, z.shape[1], aligned),
        )
        if not (need_down or need_up):
            return _grad_h(dout, dz, down_weight, add_input), None, None, None, None
        # without need_down h was not kept; anything of its shape will do, its gradient is thrown away
        source = row_major(h) if h is not None else dout
        dh = torch.empty_like(dout, memory_format=torch.contiguous_format) if need_h else None
        plan = _plan(kernels.ADAPTER_GRAD_H_WEIGHTS, dout, z.shape[1], aligned)
        grads = _parameter_gradients(dout, source, dz, active, down_weight, up_weight, dh, add_input, plan)
    d_up_weight, d_down_weight, d_up_bias, d_down_bias = grads
    return (
        dh,
        d_down_weight if need_down else None,
        d_down_bias if need_down else None,
        d_up_weight if need_up else None,
        d_up_bias if need_up else None,
    )


def _plan(kernel: Kernel, rows: Tensor, size: int, aligned: bool) -> Plan:
    m, hidden = rows.shape
    shape = Shape(m=m, n=hidden, k=hidden, r=size, aligned=aligned)
    return plans.choose(kernel, shape, rows.dtype, targets.detect(rows.device))


def _grad_h(dout: Tensor, dz: Tensor, down_weight: Tensor, add_input: bool) -> Tensor:
    # frozen parameters: dh alone is a single library product
    dh = dz @ down_weight.to(dz.dtype)
    return dh.add_(dout) if add_input else dh


def _parameter_gradients(
    dout: Tensor,
    h: Tensor,
    dz: Tensor,
    active: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    dh: Tensor | None,
    add_input: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dW_u, dW_d, db_u and db_d, and dh on the way."""
    hidden, size = up_weight.shape
    grads = (
        torch.empty_like(up_weight),
        torch.empty_like(down_weight),
        up_weight.new_empty(hidden),
        down_weight.new_empty(size),
    )
    partial = dout.new_empty(plan.splits, sum(g.numel() for g in grads), dtype=torch.float32)
    adapter_grad_h_weights(dout, h, dz, active, down_weight, dh, partial, add_input=add_input, plan=plan)
    sum_four_partials(partial, grads)
    return grads
