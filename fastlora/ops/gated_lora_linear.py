"""LoRA's linear op on an activation, act(gate)·up or act(gate), which backward computes again.

Between the layers of a gated MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202) autograd keeps gate,
act(gate), up and their product; of one without a gate, what the activation is applied to, its value, and what
a formula in Python has in between. Gate and up say it all.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core.checks import check_gated
from fastlora.ops.lora_linear import decided, layer_gradients
from fastlora.ops.lora_passes import lora_linear_forward
from fastlora.ops.lora_torch import row_blocks
from fastlora.ops.runtime import draw_seed, in_dtype, refuse_second_derivative, rows_of
from fastlora.ops.weights import in_parts
from fastlora.ops.weights.frozen import FrozenWeight, Unchanged
from fastlora.reference import GATES, Gate


def _gelu_tanh_backward(grad: Tensor, gate: Tensor) -> Tensor:
    dgate: Tensor = torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")
    return dgate


# backward's: what differs by rounding alone takes a step instead of many
_AGAIN = GATES | {"gelu_new": GATES["gelu_tanh"]}
# given the gradient of act(gate) and the gate
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": _gelu_tanh_backward,
    "gelu_new": _gelu_tanh_backward,
    # it is silu(1.702·gate) / 1.702
    "quick_gelu": lambda grad, gate: torch.ops.aten.silu_backward(grad, 1.702 * gate),
}


def gated_lora_linear(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    activation: Gate = "silu",
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`lora_linear` of x = act(gate)·up, the last layer of an MLP with LoRA, gated or not.

    Equal to it, gradients too, on a CPU to the bit; of gelu_new and quick_gelu, which are formulas of several
    steps, only the output: backward rounds less often. It keeps gate and up, which the layers before have
    computed anyway, instead of gate, act(gate), up and x: half of what a gated MLP's activations take, and
    half to a fifth of another's.

    Args:
        gate: ``[..., in_features]``, what the activation is applied to.
        up: ``[..., in_features]``, what it is multiplied with, of gate's shape and dtype; None in an MLP
            without a gate, where x = act(gate).
        weight: ``[out_features, in_features]``, dense or quantised, as for :func:`lora_linear`.
        bias: ``[out_features]``, or None.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        activation: silu, gelu (the exact one), gelu_tanh, gelu_new (the same as GPT-2 and Phi round it) or
            quick_gelu (CLIP's).
        scaling: Factor of the low-rank path, usually alpha / rank.
        dropout: Probability of zeroing an element of the low-rank path's input x.
        training: Without it dropout does nothing.
        generator: Source of the mask's seed, on gate's device; torch's default generator without it.

    Returns:
        ``[..., out_features]`` in gate's dtype, or autocast's.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes, dtypes, devices, scalars or the activation do not fit, or the selected backend
            can't serve them.

    Example:
        >>> import torch
        >>> from fastlora.functional import gated_lora_linear
        >>> gate, up, weight = torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)
        >>> gated_lora_linear(gate, up, weight, None, torch.ones(1, 3), torch.ones(3, 1), scaling=0.5)
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    check_gated(gate, up, activation)
    layer = (weight, bias, lora_A, lora_B)
    # the product isn't there yet; its layout follows from gate's, and need not be the same
    call = decided(gate, *layer, scaling, dropout, training, of="gated_lora_linear")
    if call.decision.backend == "reference":
        dense = weight.dense(call.dtype) if isinstance(weight, FrozenWeight) else weight
        options: dict[str, Any] = {"scaling": call.scaling, "dropout": dropout, "training": call.dropout > 0}
        return reference.gated_lora_linear(
            gate, up, dense, bias, lora_A, lora_B, activation=activation, **options, generator=generator
        )
    seed = draw_seed(gate.device, generator) if call.dropout else None
    y: Tensor = GatedLoRALinearFunction.apply(gate, up, *layer, seed, activation, *call)[0]
    return y


class GatedLoRALinearFunction(torch.autograd.Function):
    """Autograd of :func:`gated_lora_linear`. Saves gate, up, S, the mask and the weights."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, *call: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, S and the dropout mask; keeps what the wanted gradients need."""
        weight, bias, lora_A, lora_B, seed, ctx.activation, ctx.dtype, *settings = call
        ctx.scaling, ctx.dropout, ctx.decision = settings
        quantised = isinstance(weight, FrozenWeight)
        run: Any = in_parts.forward if quantised else lora_linear_forward
        x = _product(gate, up, GATES[ctx.activation], ctx.dtype)
        y, s, mask = run(x, weight, bias, lora_A, lora_B, seed, *settings)
        ctx.mark_non_differentiable(*((s,) if mask is None else (s, mask)))
        ctx.set_materialize_grads(False)
        need_x = any(ctx.needs_input_grad[:2])
        ctx.quantised = Unchanged(weight) if quantised and need_x else None
        ctx.save_for_backward(gate, up, None if quantised or not need_x else weight, lora_A, lora_B, s, mask)
        return y, s, mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of gate, up, weight, bias, lora_A and lora_B, those that are wanted."""
        dy = grads[0]
        if dy is None:
            return (None,) * 12
        with torch.no_grad():
            wanted = _gradients(ctx, dy)
        return (*refuse_second_derivative("gated_lora_linear", ctx, (dy,), wanted), *(None,) * 6)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_gate, need_up, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
    gate, up, weight, *kept = ctx.saved_tensors
    weight = weight if ctx.quantised is None else ctx.quantised.weight()
    x = _product(gate, up, _AGAIN[ctx.activation], ctx.dtype) if need_A or need_weight else None
    needed = (need_gate or need_up, need_weight, need_bias, need_A, need_B)
    dx, *of_layer = layer_gradients(ctx, needed, dy, dy, (x, weight, *kept))
    # its memory serves what follows
    del x
    if dx is None:
        return None, None, *of_layer
    dgate, dup = _split_gradient(in_dtype(dx, gate.dtype), gate, up, ctx.activation)
    return dgate if need_gate else None, dup if need_up else None, *of_layer


def _product(
    gate: Tensor, up: Tensor | None, activation: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """act(gate)·up, or act(gate), in the call's dtype."""
    x = activation(gate)
    return in_dtype(x if up is None else x.mul_(up), dtype)


def _split_gradient(
    dx: Tensor, gate: Tensor, up: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up, given that of act(gate)·up, whose memory the last of them takes."""
    if up is None:
        for dx_rows, gate_rows in _blocks(dx, gate):
            dx_rows.copy_(_BACKWARD[activation](dx_rows, gate_rows))
        return dx, None
    dgate = torch.empty_like(dx)
    for dx_rows, gate_rows, up_rows, dgate_rows in _blocks(dx, gate, up, dgate):
        dgate_rows.copy_(_BACKWARD[activation](dx_rows * up_rows, gate_rows))
        dx_rows.mul_(_AGAIN[activation](gate_rows))
    return dgate, dx


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, some at a time; all at once in a graph, which joins the loops itself."""
    if torch.compiler.is_compiling():
        return iter((tensors,))
    return row_blocks(*(rows_of(tensor) for tensor in tensors))
