"""The forward pass of layers that share their input on the ``triton`` backend: x is read once for every S.

Tensors are 2-D: x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, S ``[M, R]``; outputs
and ranks differ by layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import kernel_paths
from fastlora.ops.decide import Paths, in_wide_words, is_aligned
from fastlora.ops.keep_mask import drop_threshold, empty_keep_mask, keep_probability
from fastlora.ops.lora_triton import fill_from_s
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import contiguous, current_device, in_dtype, row_major, rows_of
from fastlora_kernels import targets
from fastlora_kernels.choose.shared_forward import SharedForwardPath, shared_down_plan
from fastlora_kernels.launch import Ready
from fastlora_kernels.partials import sum_partials
from fastlora_kernels.shared.down import shared_down
from fastlora_kernels.shared.kernels import MOST_LAYERS
from fastlora_kernels.tile import Shape

# y, S and, with dropout, the mask of a layer
_Made = tuple[Tensor, Tensor, Tensor | None]


def forward(
    x: Tensor,
    layers: Sequence[Sequence[Any]],
    seeds: Sequence[Tensor | None],
    *,
    scalings: tuple[float, ...],
    dropouts: tuple[float, ...],
    paths: Sequence[Paths | None],
    path: SharedForwardPath | None = None,
    known: dict[Any, Any] | None = None,
) -> list[_Made] | None:
    """y, S and mask of two or three layers; None where each is computed by itself.

    Args:
        x: ``[..., K]``.
        layers: Weight, bias, lora_A and lora_B of each.
        seeds: A seed for each layer's mask, or none at all.
        scalings: Factor of each low-rank path.
        dropouts: Probabilities of zeroing an element, 0 without a seed.
        paths: Each layer's own, of which those that fill y from S are taken.
        path: Chosen unless it is given.
        known: Keeps what is chosen and prepared, of calls whose every layer has the same signature.
    """
    flat, outputs = rows_of(x), tuple([layer[0].shape[0] for layer in layers])
    path = path or (None if known is None else known.get(forward))
    if path is None:
        path = _choose(flat, layers, dropping=seeds[0] is not None)
        if known is not None:
            known[forward] = path
    if path == "separate":
        return None
    # what lies otherwise is copied once for all
    flat, absent = row_major(flat), [None] * (MOST_LAYERS - len(layers))
    tensors = (*(layer[2] for layer in layers), *absent, *seeds, *absent)
    made = _make_s(flat, *tensors, outputs=outputs, scalings=scalings, dropouts=dropouts, known=known)
    found = list[_Made]()
    for number, ((weight, bias, _, lora_B), (s, mask), own) in enumerate(
        zip(layers, made, paths, strict=True)
    ):
        # allocated in its final shape: autograd refuses in-place changes of an output that is a view
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        bias = None if bias is None else in_dtype(bias, x.dtype)
        tensors = (flat, in_dtype(weight, x.dtype), bias, s, lora_B, rows_of(y))
        fill_from_s(*tensors, paths=own, known=None if known is None else known.setdefault(number, {}))
        found.append((y, s, mask))
    return found


def _choose(x: Tensor, layers: Sequence[Sequence[Any]], *, dropping: bool) -> SharedForwardPath:
    shapes = _shapes(x, [layer[2] for layer in layers], [layer[0].shape[0] for layer in layers])
    with current_device(x):
        return kernel_paths.choose_shared_forward(shapes, x.dtype, x.device, dropping=dropping)


@prepared(row_major, *(contiguous,) * MOST_LAYERS)
def _make_s(
    x: Tensor,
    *tensors: Tensor | None,
    outputs: tuple[int, ...],
    scalings: tuple[float, ...],
    dropouts: tuple[float, ...],
) -> Callable[..., list[tuple[Tensor, Tensor | None]]]:
    """S and, with seeds, the mask of every layer; tensors are every lora_A, then every seed."""
    shapes = _shapes(x, tensors, outputs)
    m, ranks = x.shape[0], [shape.r for shape in shapes]
    plan = shared_down_plan(shapes, x.dtype, targets.detect(x.device))
    scales = [
        scaling / keep_probability(dropout) for scaling, dropout in zip(scalings, dropouts, strict=True)
    ]
    multiply = Ready(
        shared_down,
        drop_thresholds=[drop_threshold(dropout) for dropout in dropouts],
        scales=scales,
        plan=plan,
    )
    total, sizes = Ready(sum_partials), [m * r for r in ranks]

    def run(x: Tensor, *tensors: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        masks = [None if seed is None else empty_keep_mask("triton", m, x) for seed in tensors[MOST_LAYERS:]]
        all_s = x.new_empty(sum(sizes))
        several = plan.splits > 1
        partial = x.new_empty(plan.splits, sum(sizes), dtype=torch.float32) if several else all_s
        of_layers = zip(tensors[:MOST_LAYERS], tensors[MOST_LAYERS:], masks, strict=True)
        multiply(x, partial, *(each for layer in of_layers for each in layer))
        if several:
            total(partial, all_s)
        views = [s.view(m, r) for s, r in zip(all_s.split(sizes), ranks, strict=True)]
        return list(zip(views, masks, strict=False))

    return run


def _shapes(x: Tensor, lora_as: Sequence[Tensor | None], outputs: Sequence[int]) -> tuple[Shape, ...]:
    """Sizes of each layer's call; of its tensors x alone is read here."""
    (m, k), aligned = x.shape, is_aligned(x)
    ranks = [lora_a.shape[0] for lora_a in lora_as[: len(outputs)] if lora_a is not None]
    return tuple(
        Shape(m=m, n=n, k=k, r=r, aligned=aligned and in_wide_words(n))
        for n, r in zip(outputs, ranks, strict=True)
    )
