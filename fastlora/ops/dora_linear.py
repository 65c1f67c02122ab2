"""DoRA's linear op: lora_linear with every output multiplied by a trained magnitude over a norm."""

from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core import backend as _backend
from fastlora._core.checks import check_compute_dtype, check_lora_linear, check_magnitude
from fastlora.ops import _dora_library
from fastlora.ops._autocast import autocast_dtype
from fastlora.ops._autograd import draw_seed, refuse_second_derivative
from fastlora.ops.lora_linear import choose_backend, layer_gradients


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
    weight_norm: Tensor | None = None,
) -> Tensor:
    """y = m/‖W + s·B·A‖ ⊙ (x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ) + bias (Liu et al., https://arxiv.org/abs/2402.09353).

    ‖·‖ is the norm of every row and a constant to autograd (the paper's section 4.3); W + s·B·A is never
    formed. Dropout acts on the low-rank path alone, as in LoRA: the paper's published code and PEFT multiply
    the dropped x by W a second time while training. Equal to :func:`fastlora.reference.dora_linear` within
    that formula's own rounding error. Beside what :func:`lora_linear` keeps for backward, the product in
    brackets is kept, if the magnitude needs a gradient.

    Args:
        x: ``[..., in_features]`` in float64, float32, float16 or bfloat16; autocast is honoured. Nested
            tensors, like quantised or sharded weights, run the eager formula.
        weight: ``[out_features, in_features]`` in x's dtype.
        bias: ``[out_features]`` in x's dtype, or None.
        lora_A: ``[rank, in_features]`` in any of these dtypes.
        lora_B: ``[out_features, rank]``, likewise.
        magnitude: m ``[out_features]``, likewise; never rounded to x's dtype.
        scaling: Factor of the low-rank path, usually alpha / rank.
        dropout: Probability of zeroing an element of the low-rank path's input, in steps of 2⁻¹⁶;
            1 leaves nothing of it.
        training: Without it dropout does nothing.
        generator: Source of the mask's seed, on x's device; torch's default generator without it.
        weight_norm: :func:`dora_weight_norm` of the same matrices, where it is known already.

    Returns:
        ``[..., out_features]`` in x's dtype, or autocast's.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes, dtypes, devices or scalars do not fit, or the selected backend can't serve them.

    Example:
        >>> import torch
        >>> from fastlora.functional import dora_linear
        >>> x, weight, a, b = torch.ones(1, 2), torch.eye(2), torch.zeros(1, 2), torch.zeros(2, 1)
        >>> dora_linear(x, weight, None, a, b, torch.tensor([1.0, 3.0]), scaling=1.0)
        tensor([[1., 3.]])
    """
    check_lora_linear(x, weight, bias, lora_A, lora_B, scaling=scaling, dropout=dropout)
    check_magnitude(magnitude, weight)
    autocast = autocast_dtype(x)
    if autocast is None:
        check_compute_dtype(x, weight, bias)
    compute_dtype = autocast or x.dtype
    dropping = training and dropout > 0
    backend = choose_backend(x, weight, lora_A, compute_dtype, dropping=dropping, dora=True)
    if backend == "reference":
        return reference.dora_linear(
            x,
            weight,
            bias,
            lora_A,
            lora_B,
            magnitude,
            scaling=scaling,
            dropout=dropout,
            training=training,
            generator=generator,
            weight_norm=weight_norm,
        )
    if weight_norm is None:
        weight_norm = dora_weight_norm(weight, lora_A, lora_B, scaling)
    factor = magnitude.to(weight_norm.dtype) / weight_norm
    if dropping and dropout == 1:
        # nothing is kept: a factor of zero does it, without a mask; the norm is of the whole sum
        scaling, dropping = 0.0, False
    active_dropout = float(dropout) if dropping else 0.0
    seed = draw_seed(x.device, generator) if dropping else None
    y: Tensor = DoRALinearFunction.apply(
        x.to(compute_dtype), weight, bias, lora_A, lora_B, factor, seed, scaling, active_dropout, backend
    )[0]
    return y


@torch.no_grad()
def dora_weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Norms of the rows of W + s·B·A; the sum exists a few rows at a time only.

    Args:
        weight: W ``[out, in]``, any floating dtype.
        lora_A: A ``[rank, in]``.
        lora_B: B ``[out, rank]``.
        scaling: s.

    Returns:
        ``[out]`` in float32, for float64 weights in float64; without a gradient.
    """
    backend = _backend.resolve(weight.device, weight.dtype)
    return _dora_library.dora_weight_norm(weight, lora_A, lora_B, scaling, backend)


class DoRALinearFunction(torch.autograd.Function):
    """Autograd of :func:`dora_linear`, given the factor m/‖W + s·B·A‖."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        factor: Tensor,
        seed: Tensor | None,
        scaling: float,
        dropout: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, S, the dropout mask and the product (empty where they are not there)."""
        need_x, need_weight, _, need_A, need_B, need_factor = ctx.needs_input_grad[:6]
        y, s, mask, product = _dora_library.dora_linear_forward(
            x, weight, bias, lora_A, lora_B, factor, seed, scaling, dropout, need_factor, backend
        )
        ctx.scaling, ctx.dropout, ctx.backend = scaling, dropout, backend
        ctx.mark_non_differentiable(s, mask, product)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            weight if need_x else None,
            lora_A if need_x or need_A else None,
            lora_B if need_x or need_A or need_B else None,
            s if need_B else None,
            mask if need_x or need_A else None,
            product if need_factor else None,
            factor,
        )
        return y, s, mask, product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias, lora_A, lora_B and factor, those that are wanted."""
        dy = grads[0]
        if dy is None:
            return (None,) * 10
        with torch.no_grad():
            *saved, product, factor = ctx.saved_tensors
            dproduct, dfactor = _dora_library.dora_grad_product(dy, product, factor, ctx.backend)
            wanted = layer_gradients(ctx, dy, dproduct, (*saved, None))
        wanted = (*wanted, None if product is None else dfactor)
        return (*refuse_second_derivative("dora_linear", ctx, dy, wanted), None, None, None, None)
