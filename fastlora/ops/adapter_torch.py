"""The ``torch`` backend of adapter: library matrix products, and nothing of h's size beside the results.

Tensors are 2-D: h ``[M, H]``, down_weight ``[D, H]``, up_weight ``[H, D]``, z ``[M, D]``.

The eager formula writes act(z)·W_uᵀ and dz·W_d out before it adds them; here they are made where they end up.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.ops.keep_mask import draw_keep_mask, keep_probability
from fastlora.ops.runtime import in_dtype, packed
from fastlora.reference import ACTIVATIONS

# where dropout strikes, z is set to a value at which every activation and its slope are exactly 0
_DROPPED = -30000.0
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda gradient, z: torch.ops.aten.threshold_backward(gradient, z, 0),
    "silu": torch.ops.aten.silu_backward,
}


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
    z = _linear(h, down_weight, down_bias)
    if seed is not None:
        z.masked_fill_(draw_keep_mask((z.shape[0], z.shape[1]), dropout, seed) == 0, _DROPPED)
    active = _active(z, activation, dropout)
    if residual is None:
        return _linear(active, up_weight, up_bias), z
    # one pass over the output less than adding the residual last
    out = h.new_empty(h.shape)
    if up_bias is None:
        out.copy_(residual)
    else:
        torch.add(residual, in_dtype(up_bias, h.dtype), out=out)
    return out.addmm_(active, packed(in_dtype(up_weight, h.dtype)).t()), z


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
    """dz = (dOut·W_u) ⊙ act'(z), dW_u = dOutᵀ·act(z), dW_d = dzᵀ·h, dh = dz·W_d, plus dOut."""
    dh = d_down_weight = d_down_bias = d_up_weight = d_up_bias = None
    dout = packed(dout)
    if need_up:
        d_up_weight = in_dtype(dout.t() @ _active(z, activation, dropout), up_weight.dtype)
        d_up_bias = in_dtype(dout.sum(0), up_weight.dtype)
    if need_h or need_down:
        dz = _SLOPES[activation](dout @ packed(in_dtype(up_weight, dout.dtype)), z)
        if dropout > 0:
            dz.mul_(1 / keep_probability(dropout))
        if need_down and h is not None:
            d_down_weight = in_dtype(dz.t() @ packed(h), down_weight.dtype)
            d_down_bias = in_dtype(dz.sum(0), down_weight.dtype)
        if need_h:
            down = packed(in_dtype(down_weight, dout.dtype))
            dh = torch.addmm(dout, dz, down) if add_input else torch.mm(dz, down)
    return dh, d_down_weight, d_down_bias, d_up_weight, d_up_bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # faster than a product into a given tensor: the library fuses the bias
    bias = None if bias is None else in_dtype(bias, x.dtype)
    return F.linear(packed(x), packed(in_dtype(weight, x.dtype)), bias)


def _active(z: Tensor, activation: str, dropout: float) -> Tensor:
    active = ACTIVATIONS[activation](z)
    return active.mul_(1 / keep_probability(dropout)) if dropout > 0 else active
