"""LoRA's linear op on layers that share their input, as an attention's query, key and value do.

x is kept once, and its gradient is written once instead of once a layer and then added up.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora._core import backend
from fastlora.ops import shared_before_graphs, shared_passes
from fastlora.ops.lora_linear import Call, decided, lora_linear, needed_of
from fastlora.ops.runtime import draw_seed, in_dtype, refuse_second_derivative
from fastlora.ops.weights.frozen import FrozenWeight, Unchanged

# tensors of a layer among a Function's arguments, and among what it keeps, of which the last is the mask
_GIVEN, _KEPT = 4, 5
_MASK = _KEPT - 1


class Projection(NamedTuple):
    """A linear layer with LoRA, one of several on the same x.

    Attributes:
        weight: ``[out_features, in_features]`` in x's dtype, or quantised, as for :func:`lora_linear`.
        bias: ``[out_features]`` in x's dtype, or None.
        lora_A: ``[rank, in_features]`` in any floating dtype.
        lora_B: ``[out_features, rank]`` in any floating dtype.
        scaling: Factor of the low-rank path, usually alpha / rank.
        dropout: Probability of zeroing an element of the low-rank path's input.
    """

    weight: Tensor | FrozenWeight
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0


def shared_lora_linear(
    x: Tensor,
    layers: Sequence[Projection],
    *,
    training: bool = True,
    one_mask: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_linear` of several layers on one x, for instance an attention's query, key and value.

    Without ``one_mask`` every y, S and mask is the one that a call of its own gives, masks from the same
    seeds in the order of the layers; on a CPU to the bit. The backward pass is one for all layers: x is kept
    once, and dX summed where it lies. Where gradients are taken of one y after the other, all but the last
    time need ``retain_graph=True``.

    With kernels one launch reads x for S of two or three layers, and one writes their dX, where that is
    predicted to be faster; of layers with dense weights, all with dropout or none. Of others, and on a CPU,
    each layer's S reads x, and each dX is added to the same memory.

    Compiled graphs, the eager formula (float64, backend ``reference``) and whatever watches single operations
    (``torch.func``, tracers) compute layer by layer.

    Args:
        x: ``[..., in_features]`` in float64, float32, float16 or bfloat16; autocast is honoured.
        layers: At least one; ranks, sizes, factors, dropout and what trains may differ.
        training: Without it dropout does nothing.
        one_mask: Let layers of the same dropout drop the same elements of x. One mask is kept for all of
            them; a CPU draws it once, and masks x once for those of one factor. Layers that compute one by
            one have masks of their own.
        generator: Source of the masks' seeds, on x's device; torch's default generator without it.

    Returns:
        ``[..., out_features]`` of every layer, in x's dtype, or autocast's.

    Raises:
        TypeError: A layer is no :class:`Projection`, or a tensor isn't of floating point.
        ValueError: There is no layer, or shapes, dtypes, devices or scalars do not fit, or the selected
            backend can't serve them.

    Example:
        >>> import torch
        >>> from fastlora.functional import Projection, shared_lora_linear
        >>> lora_A, lora_B = torch.ones(1, 3), torch.ones(2, 1)
        >>> key = Projection(torch.zeros(2, 3), None, lora_A, lora_B, scaling=0.5)
        >>> shared_lora_linear(torch.ones(1, 3), [key, key._replace(scaling=2.0)])
        (tensor([[1.5000, 1.5000]]), tensor([[6., 6.]]))
    """
    _check_layers(layers)
    calls = [decided(x, *layer, training) for layer in layers]
    watched = torch.compiler.is_compiling() or backend.is_watched()
    if not watched and any(call.decision.in_graph for call in calls):
        shared_before_graphs.load(x, layers, calls)
    if watched or not shared_passes.are_together(call.decision for call in calls):
        return _apart(x, layers, training, generator)
    seeds = _seeds(x, calls, generator, one_mask=one_mask)
    tensors = [tensor for layer in layers for tensor in layer[:_GIVEN]]
    ys: tuple[Tensor, ...] = SharedLoRALinearFunction.apply(
        in_dtype(x, calls[0].dtype), calls, seeds, *tensors
    )
    return ys


def _seeds(
    x: Tensor, calls: Sequence[Call], generator: torch.Generator | None, *, one_mask: bool
) -> list[Tensor | None]:
    """Of every layer's mask; the same tensor for layers that have one mask."""
    seeds, drawn = list[Tensor | None](), dict[float, Tensor]()
    for call in calls:
        seed = drawn.get(call.dropout) if one_mask else None
        if call.dropout and seed is None:
            seed = drawn[call.dropout] = draw_seed(x.device, generator)
        seeds.append(seed)
    return seeds


def _check_layers(layers: Sequence[Projection]) -> None:
    expected = "expected layers of shared_lora_linear as a list of fastlora.functional.Projection"
    if not isinstance(layers, Sequence):
        raise TypeError(f"{expected}, got {type(layers).__name__}")
    if not layers:
        raise ValueError("expected at least one layer in shared_lora_linear, got none")
    for layer in layers:
        if not isinstance(layer, Projection):
            raise TypeError(
                f"{expected}, got a {type(layers).__name__} with a {type(layer).__name__} in it; write "
                "Projection(weight, bias, lora_A, lora_B, scaling), and put a single one into a list, too"
            )


def _apart(
    x: Tensor, layers: Sequence[Projection], training: bool, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"training": training, "generator": generator}
    ys = []
    for weight, bias, lora_A, lora_B, scaling, dropout in layers:
        layer = (weight, bias, lora_A, lora_B)
        ys.append(lora_linear(x, *layer, scaling=scaling, dropout=dropout, **options))
    return tuple(ys)


class SharedLoRALinearFunction(torch.autograd.Function):
    """Autograd of :func:`shared_lora_linear`. Saves x, and each layer's S, mask and weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, calls: Sequence[Call], seeds: Sequence[Tensor | None], *tensors: Any
    ) -> tuple[Tensor, ...]:
        """Every layer's y; keeps what the wanted gradients need."""
        ys, kept, kept_x = [], list[Tensor | None](), None
        ctx.calls, ctx.quantised = calls, list[Unchanged | None]()
        layers = [*_by_layer(tensors, _GIVEN)]
        made = shared_passes.forward(x, calls, seeds, layers)
        for (y, s, mask), layer, needed in zip(made, layers, _needed(ctx), strict=True):
            weight, _, lora_A, lora_B = layer
            quantised = isinstance(weight, FrozenWeight)
            ctx.quantised.append(Unchanged(weight) if quantised and needed[0] else None)
            of_x, *of_layer = needed_of(needed, x, None if quantised else weight, lora_A, lora_B, s, mask)
            kept_x = kept_x if of_x is None else of_x
            ys.append(y)
            kept += of_layer
        ctx.masks = _places(kept[_MASK::_KEPT])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept_x, *_once(kept, ctx.masks))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and of every layer's weight, bias, lora_A and lora_B, those that are wanted."""
        with torch.no_grad():
            dx, of_layers = _gradients(ctx, dys)
        wanted = (dx, None, None, *(gradient for layer in of_layers for gradient in layer))
        return refuse_second_derivative("shared_lora_linear", ctx, dys, wanted)


def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, list[shared_passes.Gradients]]:
    """dX, and of every layer the gradients of weight, bias, lora_A and lora_B."""
    x, *kept = ctx.saved_tensors
    kept[_MASK::_KEPT] = [None if place is None else kept[_MASK::_KEPT][place] for place in ctx.masks]
    layers = dict[int, shared_passes.Layer]()
    given = zip(ctx.calls, _needed(ctx), dys, ctx.quantised, _by_layer(kept, _KEPT), strict=True)
    for index, (call, needed, dy, quantised, (weight, *more)) in enumerate(given):
        if dy is not None:
            weight = weight if quantised is None else quantised.weight()
            layers[index] = shared_passes.Layer(call, needed, dy, (x, weight, *more))
    dx, found = shared_passes.backward(list(layers.values())) if layers else (None, [])
    of_layers: list[shared_passes.Gradients] = [(None,) * _GIVEN] * len(dys)
    for index, gradients in zip(layers, found, strict=True):
        of_layers[index] = gradients
    return dx, of_layers


def _places(masks: Sequence[Tensor | None]) -> list[int | None]:
    """Of every layer the first that keeps the same mask."""
    first = dict[int, int]()
    return [None if mask is None else first.setdefault(id(mask), place) for place, mask in enumerate(masks)]


def _once(kept: Sequence[Tensor | None], masks: Sequence[int | None]) -> list[Tensor | None]:
    """What is kept, but of masks that several layers have only the first one's."""
    once = list(kept)
    once[_MASK::_KEPT] = [mask if masks[i] == i else None for i, mask in enumerate(kept[_MASK::_KEPT])]
    return once


def _by_layer(tensors: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """The tensors of each layer, of which there are so many."""
    return (tensors[start : start + count] for start in range(0, len(tensors), count))


def _needed(ctx: Any) -> Iterator[tuple[bool, ...]]:
    """Of each layer, which gradients are wanted of x, weight, bias, lora_A and lora_B."""
    need_x, _, _, *of_layers = ctx.needs_input_grad
    return ((need_x, *needed) for needed in _by_layer(of_layers, _GIVEN))
