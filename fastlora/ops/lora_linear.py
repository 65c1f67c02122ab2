"""The fused LoRA linear op: check the arguments, decide how, run it inside an autograd Function.

Beneath the Function stand the two ops of :mod:`fastlora.ops.lora_passes`; for quantised weights
:mod:`fastlora.ops.weights.in_parts` between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core.checks import check_compute_dtype, check_floating, check_lora_linear
from fastlora.ops import before_graphs
from fastlora.ops.decide import Decision, decide_lora
from fastlora.ops.lora_passes import lora_linear_backward, lora_linear_forward
from fastlora.ops.prepared import Memory, signature
from fastlora.ops.runtime import (
    autocast_dtype,
    draw_seed,
    in_dtype,
    packed,
    refuse_second_derivative,
    rows_of,
    without_autocast,
)
from fastlora.ops.weights import in_parts
from fastlora.ops.weights.frozen import FrozenWeight, Unchanged
from fastlora_kernels.choose.pinned import PINNED


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
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
    does on a CPU for 16-bit calls without dropout of up to 2²² multiplications whose sizes are even: features
    and rank, and rows too while gradients are wanted.

    Args:
        x: ``[..., in_features]`` in float64, float32, float16 or bfloat16; autocast is honoured. Nested
            tensors, like quantised or sharded weights, run the eager formula.
        weight: ``[out_features, in_features]`` in x's dtype, or quantised as
            :func:`fastlora.ops.weights.read.frozen_weight` gives it: then nothing dense is kept for backward.
        bias: ``[out_features]`` in x's dtype, or None.
        lora_A: ``[rank, in_features]`` in any of these dtypes; rounded to x's for the product, its gradient
            comes back in its own.
        lora_B: ``[out_features, rank]`` in any of these dtypes; rounded to x's for the product, its gradient
            comes back in its own.
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
    call = decided(x, weight, bias, lora_A, lora_B, scaling, dropout, training)
    if call.decision.backend == "reference":
        options: dict[str, Any] = {"scaling": call.scaling, "dropout": dropout, "training": call.dropout > 0}
        dense = weight.dense(call.dtype) if isinstance(weight, FrozenWeight) else weight
        return reference.lora_linear(x, dense, bias, lora_A, lora_B, **options, generator=generator)
    seed = draw_seed(x.device, generator) if call.dropout else None
    x = in_dtype(x, call.dtype)
    y: Tensor = LoRALinearFunction.apply(x, weight, bias, lora_A, lora_B, seed, *call[1:])[0]
    return y


class Call(NamedTuple):
    """What is known of a call before it runs: its dtype, factors and how it is computed."""

    dtype: torch.dtype
    scaling: float
    dropout: float
    decision: Decision


# by signature
_known = Memory[Call]()


def decided(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *settings: Any,
    of: str = "lora_linear",
) -> Call:
    """What is known of a call, or found out now.

    Args:
        x: What stands first of the call's tensors.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``, or None.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        *settings: Scaling, dropout, training.
        of: The op. What is prepared for one that multiplies x itself is bound to x's layout.
    """
    stored, form = (weight.tensors, weight.form) if isinstance(weight, FrozenWeight) else ((weight,), None)
    key = signature(x, *stored, bias, lora_A, lora_B, settings=(of, *settings, form))
    arguments = (x, weight, bias, lora_A, lora_B, *settings)
    # a compiled graph would be guarded by all that is remembered
    return _decide(*arguments) if key is None else _known.of(key, _decide_and_load, *arguments)


def _decide(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    training: bool,
    *,
    in_graph: bool = False,
) -> Call:
    options: dict[str, Any] = {"training": training, "in_graph": in_graph}
    if isinstance(weight, FrozenWeight):
        check_floating("x", x)
        options |= {"stored": weight.storage, "decodable": weight.is_decodable}
        # it has no dtype of its own: it becomes dense in the products'
        weight = weight.outline(x.dtype)
    check_lora_linear(x, weight, bias, lora_A, lora_B, scaling=scaling, dropout=dropout)
    dtype = autocast_dtype(x)
    if dtype is None:
        check_compute_dtype(x, weight, bias)
        dtype = x.dtype
    dropping = training and dropout > 0
    if dropping and dropout == 1:
        # nothing is kept: a factor of zero does it, without a mask
        scaling, dropping = 0.0, False
    given = (x, weight, lora_A, dtype)
    options["dropping"] = dropping
    decision = decide_lora(*given, **options)
    return Call(dtype, float(scaling), float(dropout) if dropping else 0.0, decision)


def _decide_and_load(*arguments: Any) -> Call:
    """What is known of a call that was not made before; a CUDA graph of it finds its kernels loaded."""
    call = _decide(*arguments)
    call = call._replace(decision=call.decision.of_one_signature())
    in_graph = load_for_graphs(call, lambda: _decide(*arguments, in_graph=True), *arguments[:5])
    return call if in_graph is None else call._replace(decision=replace(call.decision, in_graph=in_graph))


def load_for_graphs(
    call: Call, decide_for_graph: Callable[[], Call], x: Tensor, *layer: Any
) -> Decision | None:
    """Load what a CUDA graph of a call would launch, where ``fastlora tune`` found other winners for graphs.

    Args:
        call: How it is computed now.
        decide_for_graph: How a graph would compute it.
        x: ``[..., in_features]``.
        layer: Weight, bias, lora_A and lora_B.

    Returns:
        What was decided for a graph; None where it launches the same.
    """
    if not PINNED.tell_hosts_apart:
        return None
    in_graph = decide_for_graph().decision
    if not call.decision.differs(in_graph):
        return None
    settings: Any = {"dtype": call.dtype, "scaling": call.scaling, "dropout": call.dropout}
    before_graphs.load(x, *layer, **settings, now=call.decision, in_graph=in_graph)
    return in_graph


class LoRALinearFunction(torch.autograd.Function):
    """Autograd of :func:`lora_linear`. Saves x, S, the mask and the weights, as far as they are needed."""

    # forward with ctx, not setup_context: binding the arguments to its signature costs torch 80 µs a call
    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, S and the dropout mask of :func:`lora_linear_forward`; keeps what the wanted gradients need."""
        x, weight, _, lora_A, lora_B, _, ctx.scaling, ctx.dropout, ctx.decision = call
        quantised = isinstance(weight, FrozenWeight)
        y, s, mask = (in_parts.forward if quantised else lora_linear_forward)(*call)
        ctx.mark_non_differentiable(*((s,) if mask is None else (s, mask)))
        ctx.quantised = Unchanged(weight) if quantised and ctx.needs_input_grad[0] else None
        keep_layer(ctx, x, None if quantised else weight, lora_A, lora_B, s, mask)
        return y, s, mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias, lora_A and lora_B, those that are wanted."""
        dy = grads[0]
        if dy is None:
            return (None,) * 9
        x, weight, *kept = ctx.saved_tensors
        saved = (x, weight if ctx.quantised is None else ctx.quantised.weight(), *kept)
        if not torch.is_grad_enabled():
            return (*layer_gradients(ctx, ctx.needs_input_grad[:5], dy, dy, saved), None, None, None, None)
        with torch.no_grad():
            wanted = layer_gradients(ctx, ctx.needs_input_grad[:5], dy, dy, saved)
        return (*refuse_second_derivative("lora_linear", ctx, (dy,), wanted), None, None, None, None)


def keep_layer(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    mask: Tensor | None,
    *more: Tensor | None,
) -> None:
    """Keep for backward those of these tensors that the wanted gradients need, and all of ``more``."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*needed_of(ctx.needs_input_grad, x, weight, lora_A, lora_B, s, mask), *more)


def needed_of(needed: Sequence[bool], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of x, weight, lora_A, lora_B, S and mask that the wanted gradients need."""
    x, weight, lora_A, lora_B, s, mask = tensors
    need_x, need_weight, _, need_A, need_B = needed[:5]
    return (
        x if need_A or need_weight else None,
        weight if need_x else None,
        lora_A if need_x or need_A else None,
        lora_B if need_x or need_A or need_B else None,
        s if need_B else None,
        mask if need_x or need_A else None,
    )


def layer_gradients(
    call: Any, needed: Sequence[bool], dy: Tensor, dproduct: Tensor, saved: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, lora_A and lora_B, those that are wanted.

    Args:
        call: Holds scaling, dropout, decision: a :class:`Call`, or a Function's context.
        needed: Which of the five are wanted.
        dy: Gradient of the output.
        dproduct: Gradient of what the bias is added to.
        saved: x, weight, lora_A, lora_B, S and the mask, those that were kept.
    """
    x, weight, lora_A, lora_B, s, mask = saved
    need_x, need_weight, need_bias, need_A, need_B = needed
    dx = da = db = None
    if need_x or need_A or need_B:
        assert lora_B is not None
        settings = (call.scaling, call.dropout, need_x, need_A, need_B, call.decision)
        run: Any = in_parts.backward if isinstance(weight, FrozenWeight) else lora_linear_backward
        dx, da, db = run(dproduct, x, weight, lora_A, lora_B, s, mask, *settings)
    frozen = frozen_gradients(need_weight, need_bias, dy, dproduct, x)
    # a graph has an empty tensor for what is not needed
    return dx if need_x else None, *frozen, da if need_A else None, db if need_B else None


def frozen_gradients(
    need_weight: bool, need_bias: bool, dy: Tensor, dproduct: Tensor, x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias: frozen as a rule, but whoever trains them gets these, never silence.

    Args:
        need_weight: Whether the weight's is wanted.
        need_bias: Whether the bias's is wanted.
        dy: Gradient of the output.
        dproduct: Gradient of what the bias is added to.
        x: ``[..., in_features]``; None where the weight's is not wanted.
    """
    dweight = dbias = None
    if need_weight or need_bias:
        with without_autocast(dy):
            if need_weight and x is not None:
                dweight = packed(rows_of(dproduct)).t() @ packed(rows_of(x))
            if need_bias:
                dbias = rows_of(dy).sum(0)
    return dweight, dbias
