"""LoRA layers that share x, by library products: S of those with one mask, and the backward pass of all, each
of which adds to the one dX where it lies.

Tensors are 2-D: x ``[M, K]``, a layer's dY ``[M, N]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B
``[N, R]``, S ``[M, R]``. dS carries the factor scaling / (1 - p), applied in float32. Of layers without
dropout, and of those with one mask, dS and A stand side by side, so that their low-rank terms are one product
and all dA another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_torch import dropped_gradients, s_of_dropped, scaled_product
from fastlora.ops.runtime import in_dtype, packed
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.in_parts import rows_of_both


class Layer(NamedTuple):
    """What a layer's gradients are computed from.

    Attributes:
        dy: ``[M, N]``.
        weight: ``[N, K]``, dense or quantised; None where dX is not wanted.
        lora_A: ``[R, K]``, or None where neither dX nor its own gradient is wanted.
        lora_B: ``[N, R]``, or None where nothing that needs it is wanted.
        s: ``[M, R]``, or None where lora_B's gradient is not wanted.
        mask: ``[M, K]`` with dropout.
        scaling: Factor of the low-rank path.
        dropout: Probability of zeroing an element of its input.
        need_A: Whether lora_A's gradient is wanted.
    """

    dy: Tensor
    weight: Tensor | FrozenWeight | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    s: Tensor | None
    mask: Tensor | None
    scaling: float
    dropout: float
    need_A: bool


def make_s(
    x: Tensor, factors: Sequence[Tensor], scalings: Sequence[float], mask: Tensor, dropout: float
) -> list[Tensor]:
    """Each layer's S, of layers with one mask: one product for those whose scaling is the same.

    Args:
        x: ``[M, K]``.
        factors: Each layer's lora_A ``[R, K]``.
        scalings: The factor of each low-rank path.
        mask: ``[M, K]``.
        dropout: Probability of zeroing an element of x.
    """
    found = dict[int, Tensor]()
    for scaling in dict.fromkeys(scalings):
        places = [place for place, other in enumerate(scalings) if other == scaling]
        chosen = [in_dtype(factors[place], x.dtype) for place in places]
        s = s_of_dropped(x, torch.cat(chosen), mask, scaling=scaling, dropout=dropout)
        # a part's rows lie apart, and between them another layer's
        parts = map(packed, s.split([lora_A.shape[0] for lora_A in chosen], dim=1))
        found |= zip(places, parts, strict=True)
    return [found[place] for place in range(len(factors))]


def backward(
    x: Tensor | None, layers: Sequence[Layer], *, need_x: bool
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dX = Σ dY·W + mask ⊙ (dS·A), and each layer's dA = dSᵀ·dropped x and dB = dYᵀ·S, where wanted."""
    x = None if x is None else packed(x)
    layers = [layer._replace(dy=packed(layer.dy)) for layer in layers]
    das: list[Tensor | None] = [None] * len(layers)
    dbs = [None if s is None or b is None else in_dtype(dy.t() @ s, b.dtype) for dy, _, _, b, s, *_ in layers]
    dx = None
    side_by_side = dict[int, list[int]]()
    for index, layer in enumerate(layers):
        if layer.lora_A is not None:
            side_by_side.setdefault(id(layer.mask), []).append(index)
    without = side_by_side.pop(id(None), [])
    for places in side_by_side.values():
        dx, found = _dropped(x, [layers[place] for place in places], dx, need_x=need_x)
        das = _put(found, places, das)
    if need_x:
        dx = _plus_products(dx, layers)
    if without:
        das = _put(_side_by_side(x, [layers[place] for place in without], dx), without, das)
    return dx, das, dbs


def _put(
    found: Sequence[Tensor | None], places: Sequence[int], into: Sequence[Tensor | None]
) -> list[Tensor | None]:
    there = dict(zip(places, found, strict=True))
    return [there.get(place, other) for place, other in enumerate(into)]


def _dropped(
    x: Tensor | None, layers: Sequence[Layer], dx: Tensor | None, *, need_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX with mask ⊙ (dS·A) of layers with one mask in it, and their dA where there is an x."""
    ds, a, mask = *_beside(layers), layers[0].mask
    assert mask is not None
    into = ds.new_empty(ds.shape[0], a.shape[1]) if need_x and dx is None else dx
    x = x if any(layer.need_A for layer in layers) else None
    da = dropped_gradients(x, a, ds, mask, into, add=dx is not None)
    return into, _each(da, layers)


def _plus_products(dx: Tensor | None, layers: Sequence[Layer]) -> Tensor | None:
    """dX with every dY·W in it."""
    for layer in layers:
        assert layer.weight is not None
        for dy, weight in rows_of_both(layer.dy, layer.weight):
            dy, weight = packed(dy), packed(weight)
            # added inside the product, where its sums are in float32
            dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
    return dx


def _side_by_side(x: Tensor | None, layers: Sequence[Layer], dx: Tensor | None) -> list[Tensor | None]:
    """dA of layers without dropout, whose dS·A are added to dX where there is one."""
    ds, a = _beside(layers)
    if dx is not None:
        dx.addmm_(packed(ds), a)
    return _each(
        packed(ds).t() @ x if x is not None and any(layer.need_A for layer in layers) else None, layers
    )


def _beside(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """dS ``[M, ΣR]`` and A ``[ΣR, K]`` of layers side by side."""
    if len(layers) == 1:
        return _grad_s(layers[0]), _a(layers[0])
    ds = torch.cat([_grad_s(layer) for layer in layers], dim=1)
    return ds, torch.cat([_a(layer) for layer in layers])


def _each(da: Tensor | None, layers: Sequence[Layer]) -> list[Tensor | None]:
    """Every layer's dA of those side by side, where it is wanted."""
    if da is None:
        return [None] * len(layers)
    parts = da.split([layer.lora_B.shape[1] for layer in layers if layer.lora_B is not None])
    return [
        in_dtype(da, layer.lora_A.dtype) if layer.need_A and layer.lora_A is not None else None
        for da, layer in zip(parts, layers, strict=True)
    ]


def _grad_s(layer: Layer) -> Tensor:
    """dS = scaling / (1 - p) · dY·B."""
    dy, b, kept = layer.dy, layer.lora_B, keep_probability(layer.dropout)
    assert b is not None
    ds = dy.new_empty(dy.shape[0], b.shape[1])
    scaled_product(dy, packed(in_dtype(b, dy.dtype)), layer.scaling / kept, out=ds)
    return ds


def _a(layer: Layer) -> Tensor:
    assert layer.lora_A is not None
    return packed(in_dtype(layer.lora_A, layer.dy.dtype))
