"""The fused LoRA linear op: check the arguments, choose the backend, run inside an autograd Function."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core import backend as _backend
from fastlora._core.checks import check_compute_dtype, check_lora_linear
from fastlora.ops import _lora_library
from fastlora.ops._autocast import autocast_dtype, without_autocast
from fastlora.ops._autograd import draw_seed, refuse_second_derivative
from fastlora.ops._packing import needs_no_packing, packed
from fastlora.ops._scalars import Scalars
from fastlora.ops.runtime import in_dtype, rows_of

# multiplications of the frozen product up to which eager was faster on a CPU (AMD's Zen 4, by 2 to 15 %)
_SMALL = 2**22


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = x·Wᵀ + bias + scaling · dropout(x)·Aᵀ·Bᵀ (Hu et al., https://arxiv.org/abs/2106.09685).

    Equal to :func:`fastlora.reference.lora_linear` within that formula's own rounding error. Beside x, which
    autograd needs anyway, backward keeps only S = dropout(x)·Aᵀ ``[M, rank]`` and, with dropout, the mask:
    a bit an element with the kernels, a byte with library products. Gradients are the same bits on every run.
    Where ``fastlora tune`` measured the eager formula to be faster, that runs, and keeps what it keeps. So it
    does on a CPU for calls without dropout of up to 2²² multiplications, in 16 bits or where no gradient is
    wanted.

    Args:
        x: ``[..., in_features]`` in float64, float32, float16 or bfloat16; autocast is honoured. Nested
            tensors, like quantised or sharded weights, run the eager formula.
        weight: ``[out_features, in_features]`` in x's dtype.
        bias: ``[out_features]`` in x's dtype, or None.
        lora_A: ``[rank, in_features]`` in any of these dtypes; rounded to x's for the product, its gradient
            comes back in its own.
        lora_B: ``[out_features, rank]``, likewise.
        scaling: Factor of the low-rank path, usually alpha / rank; applied in float32. In float16 S is kept
            times scaling / (1 - dropout), which must stay below 65504.
        dropout: Probability of zeroing an element of the low-rank path's input, in steps of 2⁻¹⁶;
            1 leaves nothing of it.
        training: Without it dropout does nothing.
        generator: Source of the mask's seed, on x's device; torch's default generator without it, so that
            ``torch.manual_seed`` and ``torch.utils.checkpoint`` repeat the mask.

    Returns:
        ``[..., out_features]`` in x's dtype, or autocast's.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes, dtypes, devices or scalars do not fit, or the selected backend can't serve them.

    Example:
        >>> import torch
        >>> from fastlora.functional import lora_linear
        >>> x, weight = torch.ones(2, 3), torch.eye(3)
        >>> lora_linear(x, weight, None, torch.ones(1, 3), torch.ones(3, 1), scaling=0.5)
        tensor([[2.5000, 2.5000, 2.5000],
                [2.5000, 2.5000, 2.5000]])
    """
    check_lora_linear(x, weight, bias, lora_A, lora_B, scaling=scaling, dropout=dropout)
    autocast = autocast_dtype(x)
    if autocast is None:
        check_compute_dtype(x, weight, bias)
    compute_dtype = autocast or x.dtype
    dropping = training and dropout > 0
    if dropping and dropout == 1:
        # nothing is kept: a factor of zero does it, without a mask
        scaling, dropping = 0.0, False
    backend = choose_backend(x, weight, lora_A, compute_dtype, dropping=dropping)
    if backend == "reference":
        return reference.lora_linear(
            x,
            weight,
            bias,
            lora_A,
            lora_B,
            scaling=scaling,
            dropout=dropout,
            training=dropping,
            generator=generator,
        )
    active_dropout = float(dropout) if dropping else 0.0
    seed = draw_seed(x.device, generator) if dropping else None
    y: Tensor = LoRALinearFunction.apply(
        in_dtype(x, compute_dtype),
        weight,
        bias,
        lora_A,
        lora_B,
        seed,
        float(scaling),
        active_dropout,
        backend,
        None,
    )[0]
    return y


def lora_linear_by_scalars(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scalars: Scalars,
    training: bool,
) -> Tensor:
    """:func:`lora_linear` for compiled CPU graphs, which then stay valid when scaling or dropout change.

    Not for GPUs: a captured CUDA graph would go on with the numbers it was captured with.
    """
    if training and scalars.drops_all:
        return lora_linear(x, weight, bias, lora_A, lora_B, scaling=0.0)
    check_lora_linear(x, weight, bias, lora_A, lora_B, scaling=1.0, dropout=0.0)
    compute_dtype = autocast_dtype(x)
    if compute_dtype is None:
        check_compute_dtype(x, weight, bias)
        compute_dtype = x.dtype
    dropping = training and scalars.drops
    backend = choose_backend(x, weight, lora_A, compute_dtype, dropping=dropping)
    if backend == "reference":
        return reference.lora_linear(
            x,
            weight,
            bias,
            lora_A,
            lora_B,
            scaling=scalars.scaling,
            dropout=scalars.dropout,
            training=training,
        )
    seed = draw_seed(x.device, None) if dropping else None
    y: Tensor = LoRALinearFunction.apply(
        in_dtype(x, compute_dtype), weight, bias, lora_A, lora_B, seed, 1.0, 0.0, backend, scalars.tensor
    )[0]
    return y


class LoRALinearFunction(torch.autograd.Function):
    """Autograd of :func:`lora_linear`. Saves x, S, the mask and the weights, as far as they are needed."""

    # forward with ctx, not setup_context: binding the arguments to its signature costs torch 80 µs a call
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        scaling: float,
        dropout: float,
        backend: str,
        scalars: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, S and the dropout mask (empty or None without dropout); keeps what the wanted gradients need."""
        y, s, mask = _lora_library.lora_linear_forward(
            x, weight, bias, lora_A, lora_B, seed, scaling, dropout, backend, scalars
        )
        need_x, need_weight, _, need_A, need_B = ctx.needs_input_grad[:5]
        ctx.scaling, ctx.dropout, ctx.backend = scaling, dropout, backend
        ctx.mark_non_differentiable(*((s,) if mask is None else (s, mask)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            weight if need_x else None,
            lora_A if need_x or need_A else None,
            lora_B if need_x or need_A or need_B else None,
            s if need_B else None,
            mask if need_x or need_A else None,
            scalars,
        )
        return y, s, mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias, lora_A and lora_B, those that are wanted."""
        dy = grads[0]
        if dy is None:
            return (None,) * 10
        if not torch.is_grad_enabled():
            return (*layer_gradients(ctx, dy, dy, ctx.saved_tensors), None, None, None, None, None)
        with torch.no_grad():
            wanted = layer_gradients(ctx, dy, dy, ctx.saved_tensors)
        wanted = refuse_second_derivative("lora_linear", ctx, dy, wanted)
        return (*wanted, None, None, None, None, None)


def layer_gradients(
    ctx: Any, dy: Tensor, dproduct: Tensor, saved: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, lora_A and lora_B, those that are wanted.

    Args:
        ctx: Context of the Function whose first inputs these five are.
        dy: Gradient of the output.
        dproduct: Gradient of what the bias is added to.
        saved: x, weight, lora_A, lora_B, S, the mask and the scalars.
    """
    x, weight, lora_A, lora_B, s, mask, scalars = saved
    need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
    dx = da = db = dweight = dbias = None
    if need_x or need_A or need_B:
        assert lora_B is not None
        dx, da, db = _lora_library.lora_linear_backward(
            dproduct,
            x,
            weight,
            lora_A,
            lora_B,
            s,
            mask,
            ctx.scaling,
            ctx.dropout,
            need_x,
            need_A,
            need_B,
            ctx.backend,
            scalars,
        )
    # the base layer is frozen as a rule; whoever trains it all the same gets its gradient, never silence
    if need_weight or need_bias:
        with without_autocast(dy):
            if need_weight and x is not None:
                dweight = packed(rows_of(dproduct)).t() @ packed(rows_of(x))
            if need_bias:
                dbias = rows_of(dy).sum(0)
    return (
        dx if need_x else None,
        dweight,
        dbias,
        da if need_A else None,
        db if need_B else None,
    )


def choose_backend(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    compute_dtype: torch.dtype,
    *,
    dropping: bool,
    dora: bool = False,
) -> _backend.Backend:
    """Which implementation serves a layer call: the chosen one, or under ``auto`` the fastest for it."""
    backend = _backend.resolve(x.device, compute_dtype, x, weight)
    if not _backend.is_automatic():
        return backend
    if backend != "triton":
        eager = backend == "torch" and not (dropping or dora) and _is_small(x, weight, lora_A, compute_dtype)
        return "reference" if eager else backend
    # imported late: Triton is not installed everywhere
    from fastlora.ops.decide import has_kernels, prefers_eager
    from fastlora_kernels.tile import Shape

    n, k = weight.shape
    aligned = n % 16 == 0 and k % 16 == 0 and weight.stride(-1) == 1
    if not has_kernels(n, k, lora_A.shape[0], aligned, x.device):
        return "torch"
    # a compiled graph has to serve any number of rows
    if dora or torch.compiler.is_compiling():
        return backend
    layer = Shape(m=1, n=n, k=k, r=lora_A.shape[0], aligned=aligned)
    call = replace(layer, m=x.shape[:-1].numel())
    return "reference" if prefers_eager(call, compute_dtype, x.device, dropping=dropping) else backend


def _is_small(x: Tensor, weight: Tensor, lora_A: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether a CPU call costs more by its launches than by its passes, so that eager's fewer ones win.

    Not with dropout, whose mask has to be the same in a compiled graph, which serves any number of rows; nor
    where float32 trains, which the fused backward does as fast at any size.
    """
    if torch.compiler.is_compiling() or (compute_dtype == torch.float32 and torch.is_grad_enabled()):
        return False
    small = x.numel() * weight.shape[0] <= _SMALL
    return small and needs_no_packing(x, compute_dtype, *weight.shape, lora_A.shape[0])
