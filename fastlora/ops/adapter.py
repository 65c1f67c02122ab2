"""The fused bottleneck adapter op: check the arguments, decide how, run it inside an autograd Function.

Beneath the Function stand two ops of torch, so that it compiles; :mod:`fastlora.ops.adapter_torch` and
:mod:`fastlora.ops.adapter_triton` compute them.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core.checks import check_adapter
from fastlora.ops import adapter_torch
from fastlora.ops.decide import Decision, decide_adapter
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
from fastlora.reference import Activation

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


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
        down_weight: ``[adapter_size, hidden_size]`` in any of these dtypes. Parameters are rounded to h's for
            the products; their gradients come back in their own.
        down_bias: ``[adapter_size]`` in any of these dtypes, or None.
        up_weight: ``[hidden_size, adapter_size]`` in any of these dtypes.
        up_bias: ``[hidden_size]`` in any of these dtypes, or None.
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
    parameters = (down_weight, down_bias, up_weight, up_bias)
    added, name = (h, residual) if isinstance(residual, str) else (residual, None)
    key = signature(h, *parameters, added, settings=(name, activation, dropout, training))
    arguments = (h, *parameters, residual, activation, dropout, training)
    # a compiled graph would be guarded by all that is remembered
    call = _decide(*arguments) if key is None else _known.of(key, _decide_for_one, *arguments)
    if training and dropout == 1:
        # nothing is kept: weights of zero do it, without a mask
        parameters = (down_weight, down_bias, up_weight * 0, up_bias)
    if call.decision.backend == "reference":
        options: dict[str, Any] = {"activation": activation, "dropout": dropout, "training": call.dropout > 0}
        return reference.adapter(h, *parameters, residual=residual, **options, generator=generator)
    seed = draw_seed(h.device, generator) if call.dropout else None
    # as in eager mode, a sum of two dtypes has the wider one: under autocast a float32 stream stays float32
    fused = added is not None and added.dtype == call.dtype
    apart = added if fused and added is not h else None
    settings = (fused and added is h, activation, call.dropout, call.decision)
    out: Tensor = AdapterFunction.apply(in_dtype(h, call.dtype), *parameters, apart, seed, *settings)[0]
    return out if fused or added is None else added + out


class _Call(NamedTuple):
    """What is known of a call before it runs: its dtype, dropout's probability and how it is computed."""

    dtype: torch.dtype
    dropout: float
    decision: Decision


# by signature
_known = Memory[_Call]()


def _decide(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | str | None,
    activation: str,
    dropout: float,
    training: bool,
) -> _Call:
    parameters = (down_weight, down_bias, up_weight, up_bias)
    check_adapter(h, *parameters, residual, activation=activation, dropout=dropout)
    dtype = autocast_dtype(h) or h.dtype
    dropping = training and 0 < dropout < 1
    decision = decide_adapter(h, down_weight, dtype, dropping=dropping, training=training)
    return _Call(dtype, float(dropout) if dropping else 0.0, decision)


def _decide_for_one(*arguments: Any) -> _Call:
    """For calls of this signature alone."""
    call = _decide(*arguments)
    return call._replace(decision=call.decision.of_one_signature())


class AdapterFunction(torch.autograd.Function):
    """Autograd of :func:`adapter`. Saves h, z and the weights, as far as they are needed."""

    # forward with ctx, not setup_context: binding the arguments to its signature costs torch 80 µs a call
    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor]:
        """out and z of :func:`adapter_forward`; keeps what the wanted gradients need."""
        out, z = adapter_forward(*call)
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        h, down_weight, _, up_weight, *_ = call
        *_, ctx.add_input, ctx.activation, ctx.dropout, ctx.decision = call
        kept = (z, down_weight, up_weight) if any(ctx.needs_input_grad[:5]) else (None, None, None)
        ctx.save_for_backward(h if any(ctx.needs_input_grad[1:3]) else None, *kept)
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
        return (*refuse_second_derivative("adapter", ctx, (dout,), wanted), None, None, None, None, None)


def _wanted_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:6]
    needs = (needed[0], any(needed[1:3]), any(needed[3:5]))
    gradients: Gradients = (None,) * 5
    if any(needs):
        h, z, down_weight, up_weight = ctx.saved_tensors
        settings = (ctx.add_input, ctx.activation, ctx.dropout, *needs, ctx.decision)
        gradients = adapter_backward(dout, h, z, down_weight, up_weight, *settings)
    return tuple(g if n else None for g, n in zip((*gradients, dout), needed, strict=True))


def _fake_forward(h: Tensor, down_weight: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    return out, h.new_empty(rows_of(h).shape[0], down_weight.shape[0])


@registered(_fake_forward)
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
    decision: Decision,
) -> tuple[Tensor, Tensor]:
    """out ``[..., H]`` and the kept z ``[M, D]``, for h ``[..., H]``; ``add_input`` adds h to the output.

    z, the input of the activation, is all that is kept beside h. Where dropout struck, it holds a value at
    which the activation and its slope are 0, so that no mask is needed.
    """
    added = h if add_input else residual
    added = None if added is None else rows_of(added)
    tensors = (rows_of(h), down_weight, down_bias, up_weight, up_bias, added, seed)
    settings: dict[str, Any] = {"activation": activation, "dropout": dropout}
    if decision.backend == "torch":
        with unrecorded(h):
            out, z = adapter_torch.forward(*tensors, **settings)
    else:
        # imported late: Triton is not installed everywhere
        from fastlora.ops import adapter_triton

        out, z = adapter_triton.forward(*tensors, **settings, known=decision.known)
    # not .view: autograd refuses in-place changes of a Function's output that is a view
    return out if h.dim() == 2 else torch.ops.aten._unsafe_view(out, h.shape), z


def _fake_backward(
    dout: Tensor, h: Any, z: Any, down_weight: Tensor, up_weight: Tensor, *more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, need_h, need_down, need_up, _ = more

    def gradient(needed: bool, like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape) if needed else dout.new_empty(0)

    size, hidden = down_weight.shape
    return (
        gradient(need_h, dout, *dout.shape),
        gradient(need_down, down_weight, size, hidden),
        gradient(need_down, down_weight, size),
        gradient(need_up, up_weight, hidden, size),
        gradient(need_up, up_weight, hidden),
    )


@registered(_fake_backward)
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
    decision: Decision,
) -> Gradients:
    """dh ``[..., H]``, dW_d, db_d, dW_u and db_u, those that are needed, in their weights' dtypes."""
    kept = (rows_of(dout), None if h is None else rows_of(h), z, down_weight, up_weight)
    settings: dict[str, Any] = {"add_input": add_input, "activation": activation, "dropout": dropout}
    settings |= {"need_h": need_h, "need_down": need_down, "need_up": need_up}
    if decision.backend == "torch":
        with unrecorded(dout):
            dh, *of_parameters = adapter_torch.backward(*kept, **settings)
    else:
        from fastlora.ops import adapter_triton

        dh, *of_parameters = adapter_triton.backward(*kept, **settings)
    d_down_weight, d_down_bias, d_up_weight, d_up_bias = of_parameters
    return None if dh is None else dh.view(dout.shape), d_down_weight, d_down_bias, d_up_weight, d_up_bias
