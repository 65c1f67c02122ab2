"""The fused bottleneck adapter op: check the arguments, choose the backend, run in an autograd Function."""

from typing import Any, Literal

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core import backend as _backend
from fastlora._core.checks import check_adapter, check_adapter_size
from fastlora.ops import _adapter_library
from fastlora.ops._autocast import autocast_dtype
from fastlora.ops._autograd import draw_seed, refuse_second_derivative
from fastlora.ops._packing import needs_no_packing
from fastlora.ops.runtime import in_dtype
from fastlora.reference import Activation

# multiplications of the down-projection up to which eager was faster on a CPU (AMD's Zen 4, by 1 to 29 %)
_SMALL = 2**24


def adapter(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    residual: Tensor | Literal["input"] | None = "input",
    activation: Activation = "gelu",
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """residual + dropout(act(h·W_dᵀ + b_d))·W_uᵀ + b_u (Houlsby et al., https://arxiv.org/abs/1902.00751).

    Equal to :func:`fastlora.reference.adapter` within that formula's own rounding error. Beside h, which
    autograd needs anyway, backward keeps only z = h·W_dᵀ + b_d ``[M, adapter_size]``, with dropout too. On a
    GPU a bottleneck up to 64 runs forward in one launch, up to 256 in two, and backward in three. Gradients
    are the same bits on every run. On a CPU small calls without dropout, up to 2²⁴ multiplications of the
    down-projection, are eager's, which is faster there and keeps the activation too.

    Args:
        h: ``[..., hidden_size]`` in float64, float32, float16 or bfloat16; autocast is honoured. Nested
            tensors run the eager formula.
        down_weight: ``[adapter_size, hidden_size]`` in any of these dtypes; rounded to h's for the product,
            its gradient comes back in its own.
        down_bias: ``[adapter_size]`` or None, likewise.
        up_weight: ``[hidden_size, adapter_size]``, likewise.
        up_bias: ``[hidden_size]`` or None, likewise.
        residual: What the bottleneck's output is added to: ``"input"`` means h; a tensor of h's shape, the
            output of the layer that the adapter runs beside, say; None adds it to nothing.
        activation: ``"gelu"`` (the exact one, by erf), ``"relu"`` or ``"silu"``.
        dropout: Probability of zeroing an element after the activation, in steps of 2⁻¹⁶; 1 leaves nothing.
        training: Without it dropout does nothing.
        generator: Source of the mask's seed, on h's device; torch's default generator without it, so that
            ``torch.manual_seed`` and ``torch.utils.checkpoint`` repeat the mask.

    Returns:
        ``[..., hidden_size]`` in h's dtype; under autocast in the dtype that the sum of residual and
        autocast's dtype has.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes, devices, the activation or dropout do not fit, or the selected backend can't serve
            them (the kernels: bottlenecks up to 256).

    Example:
        >>> import torch
        >>> from fastlora.functional import adapter
        >>> down, up = torch.ones(1, 2), torch.ones(2, 1)
        >>> adapter(torch.tensor([1.0, 2.0]), down, None, up, None, activation="relu")
        tensor([4., 5.])
    """
    check_adapter(
        h, down_weight, down_bias, up_weight, up_bias, residual, activation=activation, dropout=dropout
    )
    compute_dtype = autocast_dtype(h) or h.dtype
    dropping = training and dropout > 0
    if dropping and dropout == 1:
        # nothing is kept: weights of zero do it, without a mask
        up_weight, dropping = up_weight * 0, False
    backend = _choose_backend(h, down_weight.shape[1], down_weight.shape[0], compute_dtype, dropping=dropping)
    if backend == "reference":
        return reference.adapter(
            h,
            down_weight,
            down_bias,
            up_weight,
            up_bias,
            residual=residual,
            activation=activation,
            dropout=dropout,
            training=dropping,
            generator=generator,
        )
    active_dropout = float(dropout) if dropping else 0.0
    seed = draw_seed(h.device, generator) if dropping else None
    parameters = (down_weight, down_bias, up_weight, up_bias)
    added = h if isinstance(residual, str) else residual
    # as in eager mode, a sum of two dtypes has the wider one: under autocast a float32 stream stays float32
    fused = added is not None and added.dtype == compute_dtype
    out: Tensor = AdapterFunction.apply(
        in_dtype(h, compute_dtype),
        *parameters,
        added if fused and added is not h else None,
        seed,
        fused and added is h,
        activation,
        active_dropout,
        backend,
    )[0]
    return out if fused or added is None else added + out


class AdapterFunction(torch.autograd.Function):
    """Autograd of :func:`adapter`. Saves h, z and the weights, as far as they are needed."""

    # forward with ctx, not setup_context: binding the arguments to its signature costs torch 80 µs a call
    @staticmethod
    def forward(
        ctx: Any,
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
        """out and z; keeps what the wanted gradients need."""
        out, z = _adapter_library.adapter_forward(
            h,
            down_weight,
            down_bias,
            up_weight,
            up_bias,
            residual,
            seed,
            add_input,
            activation,
            dropout,
            backend,
        )
        ctx.settings = (add_input, activation, dropout, backend)
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        need_down = any(ctx.needs_input_grad[1:3])
        kept = any(ctx.needs_input_grad[:5])
        ctx.save_for_backward(
            h if need_down else None, *((z, down_weight, up_weight) if kept else (None, None, None))
        )
        return out, z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of h, both weights and biases and the residual, those that are wanted."""
        dout = grads[0]
        if dout is None:
            return (None,) * 11
        if not torch.is_grad_enabled():
            return (*_wanted_gradients(ctx, dout), None, None, None, None, None)
        with torch.no_grad():
            wanted = _wanted_gradients(ctx, dout)
        return (*refuse_second_derivative("adapter", ctx, dout, wanted), None, None, None, None, None)


def _wanted_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:6]
    need_h, need_down, need_up = needed[0], any(needed[1:3]), any(needed[3:5])
    gradients: tuple[Tensor | None, ...] = (None,) * 5
    if need_h or need_down or need_up:
        h, z, down_weight, up_weight = ctx.saved_tensors
        add_input, activation, dropout, backend = ctx.settings
        gradients = _adapter_library.adapter_backward(
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
    return tuple(g if n else None for g, n in zip((*gradients, dout), needed, strict=True))


def _choose_backend(
    h: Tensor, hidden: int, size: int, compute_dtype: torch.dtype, *, dropping: bool
) -> _backend.Backend:
    backend = _backend.resolve(h.device, compute_dtype, h)
    if backend == "torch" and _backend.is_automatic() and not (dropping or torch.compiler.is_compiling()):
        small = h.numel() * size <= _SMALL and needs_no_packing(h, compute_dtype, hidden, size)
        return "reference" if small else backend
    if backend != "triton":
        return backend
    # imported late: Triton is not installed everywhere
    from fastlora.ops.adapter_triton import WIDEST, plans_library

    if _backend.is_automatic():
        return "torch" if plans_library(h, hidden, size, compute_dtype, dropping=dropping) else "triton"
    check_adapter_size(size, WIDEST)
    return backend
