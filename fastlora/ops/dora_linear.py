"""DoRA's linear op: lora_linear with every output multiplied by a trained magnitude over a norm.

Check the arguments, decide how, run it inside an autograd Function; the ops of torch beneath it are
:mod:`fastlora.ops.lora_linear`'s and three of its own.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core import backend as _backend
from fastlora._core.checks import check_compute_dtype, check_lora_linear, check_magnitude
from fastlora.ops import dora_torch
from fastlora.ops.decide import WITHOUT_PATHS, Decision, decide_lora
from fastlora.ops.lora_linear import Call, keep_layer, layer_gradients, load_for_graphs
from fastlora.ops.lora_passes import fake_forward
from fastlora.ops.prepared import Memory, signature
from fastlora.ops.runtime import (
    autocast_dtype,
    draw_seed,
    in_dtype,
    refuse_second_derivative,
    registered,
    rows_of,
    unrecorded,
)


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
        lora_A: ``[rank, in_features]`` in any of these dtypes; rounded to x's for the product.
        lora_B: ``[out_features, rank]`` in any of these dtypes; rounded to x's for the product.
        magnitude: m ``[out_features]`` in any of these dtypes; never rounded to x's.
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
    layer = (x, weight, bias, lora_A, lora_B)
    key = signature(*layer, magnitude, settings=(scaling, dropout, training))
    arguments = (*layer, magnitude, scaling, dropout, training)
    # a compiled graph would be guarded by all that is remembered
    call = _decide(*arguments) if key is None else _known.of(key, _decide_and_load, *arguments)
    if call.decision.backend == "reference":
        options: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "training": training}
        return reference.dora_linear(
            *layer, magnitude, **options, generator=generator, weight_norm=weight_norm
        )
    if weight_norm is None:
        weight_norm = dora_weight_norm(weight, lora_A, lora_B, scaling)
    factor = in_dtype(magnitude, weight_norm.dtype) / weight_norm
    seed = draw_seed(x.device, generator) if call.dropout else None
    x = in_dtype(x, call.dtype)
    y: Tensor = DoRALinearFunction.apply(x, weight, bias, lora_A, lora_B, factor, seed, *call[1:])[0]
    return y


# by signature
_known = Memory[Call]()


def _decide(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float,
    training: bool,
    *,
    in_graph: bool = False,
) -> Call:
    check_lora_linear(x, weight, bias, lora_A, lora_B, scaling=scaling, dropout=dropout)
    check_magnitude(magnitude, weight)
    dtype = autocast_dtype(x)
    if dtype is None:
        check_compute_dtype(x, weight, bias)
        dtype = x.dtype
    dropping = training and 0 < dropout < 1
    given = (x, weight, lora_A, dtype)
    decision = decide_lora(*given, dropping=dropping, dora=True, in_graph=in_graph)
    # where nothing is kept a factor of zero does it, without a mask; the norm is of the whole sum
    factor = 0.0 if training and dropout == 1 else float(scaling)
    return Call(dtype, factor, float(dropout) if dropping else 0.0, decision)


def _decide_and_load(*arguments: Any) -> Call:
    """What is known of a call that was not made before; a CUDA graph of it finds its kernels loaded."""
    call = _decide(*arguments)
    # measured is its backward pass alone, which is LoRA's
    load_for_graphs(call, lambda: _decide(*arguments, in_graph=True), *arguments[:5])
    return call


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

    Example:
        >>> dora_weight_norm(torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2, 1), 2.0)
        tensor([3.4641, 3.4641])
    """
    backend = _backend.resolve(weight.device, weight.dtype)
    # the reference has no way of its own to a norm
    decision = WITHOUT_PATHS["torch" if backend == "reference" else backend]
    return _dora_weight_norm(weight, lora_A, lora_B, scaling, decision)


class DoRALinearFunction(torch.autograd.Function):
    """Autograd of :func:`dora_linear`, given the factor m/‖W + s·B·A‖."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """y, S, the dropout mask and the product, of which backward gets what the wanted gradients need."""
        x, weight, bias, lora_A, lora_B, factor, seed, scaling, dropout, decision = call
        ctx.scaling, ctx.dropout, ctx.decision = scaling, dropout, decision
        keep_product = ctx.needs_input_grad[5]
        layer = (x, weight, bias, lora_A, lora_B, factor, seed)
        y, s, mask, product = dora_linear_forward(*layer, scaling, dropout, keep_product, decision)
        ctx.mark_non_differentiable(*(t for t in (s, mask, product) if t is not None))
        keep_layer(ctx, x, weight, lora_A, lora_B, s, mask, product if keep_product else None, factor)
        return y, s, mask, product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias, lora_A, lora_B and factor, those that are wanted."""
        dy = grads[0]
        if dy is None:
            return (None,) * 10
        with torch.no_grad():
            *saved, product, factor = ctx.saved_tensors
            dproduct, dfactor = dora_grad_product(dy, product, factor, ctx.decision)
            wanted = layer_gradients(ctx, ctx.needs_input_grad[:5], dy, dproduct, saved)
        wanted = (*wanted, None if product is None else dfactor)
        return (*refuse_second_derivative("dora_linear", ctx, (dy,), wanted), None, None, None, None)


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, lora_B: Any, factor: Any, *more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seed, *_, keep_product, backend = more
    y, s, mask = fake_forward(x, weight, bias, lora_A, lora_B, seed, backend)
    return y, s, mask, x.new_empty(s.shape[0], weight.shape[0]) if keep_product else x.new_empty(0)


@registered(_fake_forward)
def dora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    factor: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    keep_product: bool,
    decision: Decision,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y ``[..., N]``, S ``[M, R]``, with a seed the dropout mask and, to be kept, the product ``[M, N]``."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    product = torch.empty_like(rows_of(y)) if keep_product else None
    settings: dict[str, Any] = {"scaling": scaling, "dropout": dropout}
    bias = None if bias is None else in_dtype(bias, x.dtype)
    layer = (rows_of(x), in_dtype(weight, x.dtype), bias, lora_A, lora_B, seed, factor, rows_of(y), product)
    if decision.backend == "torch":
        with unrecorded(x):
            return y, *dora_torch.forward(*layer, **settings), product
    # imported late: Triton is not installed everywhere
    from fastlora.ops import dora_triton

    kept = dora_triton.forward(*layer, **settings, paths=decision.paths)
    return y, *kept, product


def _fake_weight_norm(weight: Tensor, *more: Any) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


@registered(_fake_weight_norm)
def _dora_weight_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, decision: Decision
) -> Tensor:
    """‖W + s·B·A‖ of every row ``[N]``, in float32 at least."""
    if decision.backend == "torch":
        with unrecorded(weight):
            return dora_torch.weight_norm(weight, lora_A, lora_B, scaling)
    from fastlora.ops import dora_triton

    return dora_triton.weight_norm(weight, lora_A, lora_B, scaling=scaling)


def _fake_grad_product(dy: Tensor, product: Tensor | None, factor: Tensor, _: str) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), factor.new_empty(0 if product is None else factor.shape)


@registered(_fake_grad_product)
def dora_grad_product(
    dy: Tensor, product: Tensor | None, factor: Tensor, decision: Decision
) -> tuple[Tensor, Tensor | None]:
    """dU = factor ⊙ dY ``[..., N]`` and, with a product, dfactor ``[N]``."""
    if decision.backend == "torch":
        with unrecorded(dy):
            dproduct, dfactor = dora_torch.grad_product(rows_of(dy), product, factor)
    else:
        from fastlora.ops import dora_triton

        dproduct, dfactor = dora_triton.grad_product(rows_of(dy), product, factor)
    return dproduct.view(dy.shape), dfactor
