"""Both passes of layers that share their input, beneath :mod:`fastlora.ops.shared_lora_linear`.

:mod:`fastlora.ops.shared_torch` sums dX by library products, :mod:`fastlora.ops.shared_triton` by kernels.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora._core import backend
from fastlora.ops import shared_torch
from fastlora.ops.decide import Decision
from fastlora.ops.keep_mask import draw_keep_mask
from fastlora.ops.lora_linear import Call, frozen_gradients, layer_gradients
from fastlora.ops.lora_passes import lora_linear_forward
from fastlora.ops.runtime import in_dtype, rows_of, unrecorded
from fastlora.ops.weights import in_parts
from fastlora.ops.weights.frozen import FrozenWeight

Gradients = tuple[Tensor | None, ...]
# y, S and, with dropout, the mask of a layer
_Made = tuple[Tensor, Tensor, Tensor | None]
# gradients of x, of every A and of every B
_Sums = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]


def are_together(decisions: Iterable[Decision]) -> bool:
    """Whether layers are computed by one Function, as all do by kernels or by library products.

    Args:
        decisions: How each layer by itself is computed.
    """
    return {decision.backend for decision in decisions} in ({"torch"}, {"triton"})


def forward(
    x: Tensor, calls: Sequence[Call], seeds: Sequence[Tensor | None], layers: Sequence[Sequence[Any]]
) -> Iterable[_Made]:
    """y, S and mask of every layer; where none shares a launch, each is computed when it is asked for.

    Args:
        x: ``[..., in_features]``.
        calls: What is known of each layer's call.
        seeds: One for each layer's mask; None without dropout.
        layers: Weight, bias, lora_A and lora_B of each.
    """
    if _share_a_launch(x, calls, seeds, layers):
        # imported late: Triton is not installed everywhere
        from fastlora.ops import shared_triton_forward

        scalings, dropouts = tuple(call.scaling for call in calls), tuple(call.dropout for call in calls)
        paths = [call.decision.paths for call in calls]
        settings: Any = {"scalings": scalings, "dropouts": dropouts, "paths": paths}
        made = shared_triton_forward.forward(x, layers, seeds, **settings, known=_known(calls))
        if made is not None:
            return _with_masks_once(made, seeds)
    return _with_masks_once(_one_after_the_other(x, calls, seeds, layers), seeds)


def _with_masks_once(made: Iterable[_Made], seeds: Sequence[Tensor | None]) -> Iterable[_Made]:
    """Of layers with one seed the first one's mask, which is the others', too."""
    places = _by_seed(seeds)
    if all(len(of_seed) == 1 for of_seed in places):
        return made
    (ys, ss, masks), first = zip(*made, strict=True), {place: each[0] for each in places for place in each}
    return [(y, s, masks[first.get(place, place)]) for place, (y, s) in enumerate(zip(ys, ss, strict=True))]


def _by_seed(seeds: Sequence[Tensor | None]) -> list[list[int]]:
    """The places of layers that have the same seed."""
    found = dict[int, list[int]]()
    for place, seed in enumerate(seeds):
        if seed is not None:
            found.setdefault(id(seed), []).append(place)
    return list(found.values())


def _one_after_the_other(
    x: Tensor, calls: Sequence[Call], seeds: Sequence[Tensor | None], layers: Sequence[Sequence[Any]]
) -> Iterator[_Made]:
    ahead = _of_one_mask(x, calls, seeds, layers)
    # not as a list: S and mask of a layer go before the next but one's come, where nothing keeps them
    for index, (call, seed, layer) in enumerate(zip(calls, seeds, layers, strict=True)):
        if index in ahead:
            (s, mask), (weight, bias, _, lora_B) = ahead.pop(index), layer
            yield in_parts.from_s(x, weight, bias, s, lora_B), s, mask
            continue
        run: Any = in_parts.forward if isinstance(layer[0], FrozenWeight) else lora_linear_forward
        yield run(x, *layer, seed, *call[1:])


def _of_one_mask(
    x: Tensor, calls: Sequence[Call], seeds: Sequence[Tensor | None], layers: Sequence[Sequence[Any]]
) -> dict[int, tuple[Tensor, Tensor]]:
    """By their places, S and the mask of layers with one seed that a library computes."""
    found = dict[int, tuple[Tensor, Tensor]]()
    for places in _by_seed(seeds) if calls[0].decision.backend == "torch" else ():
        seed, dropout = seeds[places[0]], calls[places[0]].dropout
        if len(places) > 1 and seed is not None:
            factors = [layers[place][2] for place in places]
            with unrecorded(x):
                rows = rows_of(x)
                mask = draw_keep_mask((rows.shape[0], rows.shape[1]), dropout, seed)
                scalings = [calls[place].scaling for place in places]
                made = shared_torch.make_s(rows, factors, scalings, mask, dropout)
            found |= {place: (s, mask) for place, s in zip(places, made, strict=True)}
    return found


def _known(calls: Sequence[Call]) -> dict[Any, Any] | None:
    """What is remembered of these layers together; None where one's decision serves other calls, too."""
    decisions = tuple([call.decision for call in calls])
    if any(decision.known is None for decision in decisions):
        return None
    known = decisions[0].known
    assert known is not None
    found: dict[Any, Any] = known.setdefault(decisions, {})
    return found


def _share_a_launch(
    x: Tensor, calls: Sequence[Call], seeds: Sequence[Tensor | None], layers: Sequence[Sequence[Any]]
) -> bool:
    """Whether a kernel can compute S of all: of dense layers, all with dropout or none."""
    if calls[0].decision.backend != "triton" or len({seed is None for seed in seeds}) > 1:
        return False
    if not all(isinstance(layer[0], Tensor) and backend.are_plain(x, *layer) for layer in layers):
        return False
    # imported late: a CPU needs no kernels' records
    from fastlora_kernels.shared.kernels import MOST_LAYERS

    return 2 <= len(layers) <= MOST_LAYERS


class Layer(NamedTuple):
    """Of a layer whose y has a gradient: its call, which gradients are wanted, its dY, and what was kept."""

    call: Call
    needed: tuple[bool, ...]
    dy: Tensor
    saved: tuple[Any, ...]


def backward(layers: Sequence[Layer]) -> tuple[Tensor | None, list[Gradients]]:
    """dX, and every layer's other gradients.

    Args:
        layers: One at least, all whose y has a gradient.
    """
    if _are_summed_by_library(layers):
        sums = _by_library(layers)
    elif _are_summed_by_kernels(layers):
        sums = _by_kernels(layers)
    else:
        return _one_by_one(layers)
    dx, das, dbs = sums
    found, dy = list[Gradients](), layers[0].dy
    for (_, (_, need_weight, need_bias, *_), dy, (x, *_)), da, db in zip(layers, das, dbs, strict=True):
        found.append((*frozen_gradients(need_weight, need_bias, dy, dy, x), da, db))
    return dx if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]), found


def _are_summed_by_library(layers: Sequence[Layer]) -> bool:
    """Whether library products sum dX where it lies; in 16 bits very many parts would round too often."""
    return all(
        layer.call.decision.backend == "torch" and in_parts.in_few_parts(layer.saved[1], layer.dy.dtype)
        for layer in layers
    )


def _are_summed_by_kernels(layers: Sequence[Layer]) -> bool:
    """Whether kernels sum dX of dense layers, or choose to compute them one by one."""
    if torch.compiler.is_compiling() or backend.is_watched() or any(
        call.decision.backend != "triton" or not needed[0] or not backend.are_plain(dy, *saved)
        # a quantised weight is dense for its own product alone
        or not isinstance(saved[1], Tensor)
        for call, needed, dy, saved in layers
    ):  # fmt: skip
        return False
    # imported late: a CPU needs no kernels' records
    from fastlora_kernels.shared.kernels import MOST_LAYERS

    return 2 <= len(layers) <= MOST_LAYERS


def _one_by_one(layers: Sequence[Layer]) -> tuple[Tensor | None, list[Gradients]]:
    dx, found = None, list[Gradients]()
    for call, needed, dy, saved in layers:
        part, *of_layer = layer_gradients(call, needed, dy, dy, saved)
        dx = part if dx is None or part is None else dx.add_(part)
        found.append(tuple(of_layer))
    return dx, found


def _by_library(layers: Sequence[Layer]) -> _Sums:
    dy, need_x, x = layers[0].dy, layers[0].needed[0], layers[0].saved[0]
    with unrecorded(dy):
        given = [_for_library(layer) for layer in layers]
        return shared_torch.backward(None if x is None else rows_of(x), given, need_x=need_x)


def _by_kernels(layers: Sequence[Layer]) -> _Sums:
    # imported late: Triton is not installed everywhere
    from fastlora.ops import shared_triton

    tensors, settings, x = list[Tensor | None](), [], layers[0].saved[0]
    for call, (*_, need_A, need_B), dy, (_, weight, lora_A, lora_B, s, mask) in layers:
        tensors += rows_of(dy), in_dtype(weight, dy.dtype), lora_A, lora_B, s, mask
        dropout = call.dropout if mask is not None else 0.0
        settings.append(shared_triton.Layer(call.scaling, dropout, need_A, need_B, call.decision.paths))
    return shared_triton.backward(*tensors, None if x is None else rows_of(x), layers=tuple(settings))


def _for_library(layer: Layer) -> shared_torch.Layer:
    call, (*_, need_A, _), dy, (_, weight, lora_A, lora_B, s, mask) = layer
    return shared_torch.Layer(
        rows_of(dy),
        weight,
        lora_A,
        lora_B,
        s,
        mask,
        call.scaling,
        call.dropout if mask is not None else 0.0,
        need_A,
    )
