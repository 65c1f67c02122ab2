"""The backward pass of LoRA layers that share x, by library products: each adds to the one dX where it lies.

Tensors are 2-D: x ``[M, K]``, a layer's dY ``[M, N]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B
``[N, R]``, S ``[M, R]``. dS carries the factor scaling / (1 - p), applied in float32. Of layers without
dropout dS and A stand side by side, so that their low-rank terms are one product and all dA another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_torch import dropped_gradients, scaled_product
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


def backward(
    x: Tensor | None, layers: Sequence[Layer], *, need_x: bool
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dX = Σ dY·W + mask ⊙ (dS·A), and each layer's dA = dSᵀ·dropped x and dB = dYᵀ·S, where wanted."""
    x = None if x is None else packed(x)
    layers = [layer._replace(dy=packed(layer.dy)) for layer in layers]
    das: list[Tensor | None] = [None] * len(layers)
    dbs = [None if s is None or b is None else in_dtype(dy.t() @ s, b.dtype) for dy, _, _, b, s, *_ in layers]
    dx = None
    side_by_side = []
    for index, layer in enumerate(layers):
        if layer.mask is None:
            side_by_side += [index] if layer.lora_A is not None else []
        elif layer.lora_A is not None:
            dx, das[index] = _dropped(x if layer.need_A else None, layer, dx, need_x=need_x)
    if need_x:
        dx = _plus_products(dx, layers)
    if side_by_side:
        found = _side_by_side(x, [layers[index] for index in side_by_side], dx)
        for index, da in zip(side_by_side, found, strict=True):
            das[index] = da
    return dx, das, dbs


def _dropped(
    x: Tensor | None, layer: Layer, dx: Tensor | None, *, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dX with a layer's mask ⊙ (dS·A) in it, and its dA where there is an x."""
    ds, a = _grad_s(layer), _a(layer)
    assert layer.mask is not None
    assert layer.lora_A is not None
    into = layer.dy.new_empty(ds.shape[0], a.shape[1]) if need_x and dx is None else dx
    da = dropped_gradients(x, a, ds, layer.mask, into, add=dx is not None)
    return into, None if da is None else in_dtype(da, layer.lora_A.dtype)


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
    ds = torch.cat([_grad_s(layer) for layer in layers], dim=1)
    if dx is not None:
        dx.addmm_(packed(ds), torch.cat([_a(layer) for layer in layers]))
    das: list[Tensor | None] = [None] * len(layers)
    if x is None or not any(layer.need_A for layer in layers):
        return das
    ranks = [layer.lora_B.shape[1] for layer in layers if layer.lora_B is not None]
    parts = (packed(ds).t() @ x).split(ranks)
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
