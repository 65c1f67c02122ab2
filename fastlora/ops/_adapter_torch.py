"""The ``torch`` backend of adapter: library matrix products, and nothing of h's size beside the results.

The eager formula writes act(z)·W_uᵀ and dz·W_d out before it adds them; here they are made where they end up.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.ops._keep_mask import draw_keep_mask, keep_probability
from fastlora.ops._packing import packed
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
    """out = residual + dropout(act(z))·W_uᵀ + b_u; see :mod:`fastlora.ops._adapter_library`."""
    z = _linear(h, down_weight, down_bias)
    if seed is not None:
        z.masked_fill_(draw_keep_mask((z.shape[0], z.shape[1]), dropout, seed) == 0, _DROPPED)
    out = _linear(_active(z, activation, dropout), up_weight, up_bias)
    return (out if residual is None else out.add_(residual)), z


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
        d_up_weight = (dout.t() @ _active(z, activation, dropout)).to(up_weight.dtype)
        d_up_bias = dout.sum(0).to(up_weight.dtype)
    if need_h or need_down:
        dz = _SLOPES[activation](dout @ packed(up_weight.to(dout.dtype)), z)
        if dropout > 0:
            dz.mul_(1 / keep_probability(dropout))
        if need_down and h is not None:
            d_down_weight = (dz.t() @ packed(h)).to(down_weight.dtype)
            d_down_bias = dz.sum(0).to(down_weight.dtype)
        if need_h:
            dh = torch.mm(dz, packed(down_weight.to(dout.dtype)))
            if add_input:
                dh.add_(dout)
    return dh, d_down_weight, d_down_bias, d_up_weight, d_up_bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # faster than a product into a given tensor: the library fuses the bias
    return F.linear(packed(x), packed(weight.to(x.dtype)), None if bias is None else bias.to(x.dtype))


def _active(z: Tensor, activation: str, dropout: float) -> Tensor:
    active = ACTIVATIONS[activation](z)
    return active.mul_(1 / keep_probability(dropout)) if dropout > 0 else active
