"""The backward pass of layers that share their input on the ``triton`` backend: dX is written once.

Tensors are 2-D: dY ``[M, N]``, x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, S
``[M, R]``; outputs and ranks differ by layer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops import before_graphs, kernel_paths, lora_triton_backward
from fastlora.ops.decide import Paths, in_wide_words, is_aligned
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_triton import add_low_rank
from fastlora.ops.prepared import layouts, prepared
from fastlora.ops.runtime import contiguous, row_major, unrecorded
from fastlora_kernels import targets
from fastlora_kernels.choose.shared import joined, joins_ranks, shared_plan
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.launch import Ready
from fastlora_kernels.partials import sum_partials
from fastlora_kernels.shared.grad_x import TENSORS_PER_LAYER, shared_grad_x
from fastlora_kernels.shared.kernels import MOST_LAYERS
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, Tile

# what is read of a layer
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
_LAID_OUT = (row_major, row_major, contiguous, contiguous, contiguous, contiguous)
# gradients of x, of each A and of each B
Gradients = tuple[Tensor, list[Tensor | None], list[Tensor | None]]
# fills dX, given dX, the layers and their dS, and these side by side where they are joined
_FillX = Callable[[Tensor, Sequence[_Tensors], Sequence[Tensor], Tensor | None], None]


class Layer(NamedTuple):
    """The settings of a layer's call.

    Attributes:
        scaling: Factor of the low-rank path.
        dropout: Probability of zeroing an element, 0 without a mask.
        need_A: Whether A's gradient is wanted.
        need_B: Whether B's is.
        paths: The layer's own paths, where it is computed alone.
    """

    scaling: float
    dropout: float
    need_A: bool
    need_B: bool
    paths: Paths | None


# x comes after the last layer
@prepared(*_LAID_OUT * MOST_LAYERS, row_major)
def backward(
    *tensors: Tensor | None, layers: tuple[Layer, ...], choice: Choice | None = None
) -> Callable[..., Gradients]:
    """dX of two or three layers, and each layer's dA and dB.

    Tensors are dY, weight, lora_A, lora_B, S and the mask of each layer, then x, None where no A needs it.
    Path and tile are chosen unless they are given. Where some layers alone have a mask, each is computed by
    itself.
    """
    given, x = _by_layer(tensors)
    shapes = tuple(_shape(each, x) for each in given)
    dropping = [each[-1] is not None for each in given]
    dy, target = given[0][0], targets.detect(given[0][0].device)
    if len({*dropping}) > 1:
        choice = Choice("separate")
    if choice is None:
        choose = functools.partial(
            kernel_paths.choose_shared, shapes, dy.dtype, dy.device, dropping=dropping[0]
        )
        choice = choose()
        _load_for_graphs(tensors, shapes, layers, choice, choose(in_graph=True))
    if choice.path == "separate":
        return _separate(layers)
    adapters = [each[2].dtype for each in given]
    join = joins_ranks(shapes, dropping=dropping[0]) and len({*adapters}) == 1
    join_a = join and all(layer.need_A for layer in layers)
    parts = [
        _but_x(each, shape, target, layer, need_A=layer.need_A and not join_a)
        for each, shape, layer in zip(given, shapes, layers, strict=True)
    ]
    by_library = choice.path == "epilogue"
    if by_library:
        fill_x = _by_library(shapes, dy, target, join)
    else:
        fill_x = _one_launch(shapes, dy, target, choice.tile)
    all_a = _grads_a(dy, adapters[0], shapes, target) if join_a else None
    side_by_side = join_a or (join and by_library)

    def run(*tensors: Tensor | None) -> Gradients:
        given, x = _by_layer(tensors)
        made = [part(dy, x, weight, *rest) for part, (dy, weight, *rest) in zip(parts, given, strict=True)]
        dss, das, dbs = ([*each] for each in zip(*made, strict=True))
        dx = given[0][0].new_empty(shapes[0].m, shapes[0].k)
        ds = _cat(dss, 1) if side_by_side else None
        fill_x(dx, given, dss, ds)
        if all_a is not None:
            das = all_a(x, ds)
        return dx, das, dbs

    return run


def _load_for_graphs(
    tensors: Sequence[Tensor | None],
    shapes: Sequence[Shape],
    layers: Sequence[Layer],
    now: Choice,
    in_graph: Choice,
) -> None:
    """Run what a CUDA graph would launch, where ``fastlora tune`` found another winner for graphs."""
    if now == in_graph:
        return
    given, x = _by_layer(tensors)
    dy, target = given[0][0], targets.detect(given[0][0].device)
    tiles = [before_graphs.tiles_of(shape, dy.dtype, target) for shape in (*shapes, joined(shapes))]
    rows = [before_graphs.compiled_apart_by(t) for t in (*(each[0] for each in given), x) if t is not None]
    frozen = [layouts(*each[1:4]) for each in given]
    # without its own paths a layer takes those of a graph
    as_there = tuple(layer._replace(paths=None) for layer in layers)
    dropping = given[0][-1] is not None
    own = [
        kernel_paths.choose("backward", shape, dy.dtype, dy.device, dropping=dropping, in_graph=True)
        for shape in (shapes if in_graph.path == "separate" else ())
    ]
    kernels = (in_graph, *own, as_there, dropping, *tiles, *rows, *frozen)
    before_graphs.once(kernels, backward, *tensors, layers=as_there, choice=in_graph)


def _by_layer(tensors: Sequence[Tensor | None]) -> tuple[list[_Tensors], Tensor | None]:
    *of_layers, x = tensors
    size = len(_LAID_OUT)
    return [tuple(of_layers[i : i + size]) for i in range(0, len(of_layers), size)], x  # type: ignore[misc]


def _shape(tensors: _Tensors, x: Tensor | None) -> Shape:
    dy, weight, _, lora_B, *_ = tensors
    (n, k), r = weight.shape, lora_B.shape[1]
    aligned = is_aligned(dy, weight, *(() if x is None else (x,)))
    return Shape(m=dy.shape[0], n=n, k=k, r=r, aligned=aligned)


def _separate(layers: Sequence[Layer]) -> Callable[..., Gradients]:
    """Each layer as if it were alone, its dX added to the first one's."""

    def run(*tensors: Tensor | None) -> Gradients:
        given, x = _by_layer(tensors)
        dx, das, dbs = None, [], []
        for (dy, weight, *rest), layer in zip(given, layers, strict=True):
            part, da, db = lora_triton_backward.backward(dy, x, weight, *rest, need_x=True, **layer._asdict())
            assert part is not None
            dx = part if dx is None else dx.add_(part)
            das.append(da)
            dbs.append(db)
        assert dx is not None
        return dx, das, dbs

    return run


def _but_x(
    tensors: _Tensors, shape: Shape, target: Target, layer: Layer, *, need_A: bool
) -> Callable[..., Any]:
    """What computes dS, dA and dB of a layer, of which dA only where it is wanted."""
    dy, _, lora_A, lora_B, *_ = tensors
    scale = layer.scaling / keep_probability(layer.dropout)
    s_and_b = lora_triton_backward.grad_s_b(dy, lora_B, shape, target, scale=scale)
    a_alone = lora_triton_backward.grad_x_a(
        dy, lora_A, shape, target, Choice("shared"), need_x=False, need_A=need_A
    )

    def ds_and_a(
        dy: Tensor, _: Tensor, ds: Tensor, lora_A: Tensor, mask: Tensor | None, x: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return ds, *a_alone(dy, None, ds, lora_A, mask, x)[1:]

    return lora_triton_backward.both(s_and_b, ds_and_a, need_B=layer.need_B)


def _one_launch(shapes: Sequence[Shape], dy: Tensor, target: Target, tile: Tile | None) -> _FillX:
    """dX of all layers by one launch."""
    multiply = Ready(shared_grad_x, plan=shared_plan(shapes, dy.dtype, target, tile=tile))
    absent = [None] * TENSORS_PER_LAYER * (MOST_LAYERS - len(shapes))

    def fill(dx: Tensor, given: Sequence[_Tensors], dss: Sequence[Tensor], _: Tensor | None) -> None:
        tensors = list[Tensor | None]()
        for (dy, weight, lora_A, _, _, mask), ds in zip(given, dss, strict=True):
            tensors += dy, weight, ds, lora_A, mask
        multiply(dx, *tensors, *absent)

    return fill


def _by_library(shapes: Sequence[Shape], dy: Tensor, target: Target, join: bool) -> _FillX:
    """Library products summed in dX, to which a kernel adds the low-rank ones, as one if joined."""
    aligned = in_wide_words(shapes[0].k)
    adds = [
        add_low_rank(shape, dy.dtype, target, transposed=False, aligned=aligned)
        for shape in ([joined(shapes)] if join else shapes)
    ]

    def fill(dx: Tensor, given: Sequence[_Tensors], dss: Sequence[Tensor], joined: Tensor | None) -> None:
        with unrecorded(dx):
            for i, (dy, weight, *_) in enumerate(given):
                torch.addmm(dx, dy, weight, beta=int(i > 0), out=dx)
        low_rank = [(ds, lora_A, mask) for (_, _, lora_A, *_, mask), ds in zip(given, dss, strict=True)]
        if joined is not None:
            low_rank = [(joined, _cat([lora_A for _, lora_A, _ in low_rank], 0), None)]
        for add, (ds, lora_A, mask) in zip(adds, low_rank, strict=True):
            add(ds, lora_A, mask, dx)

    return fill


def _grads_a(
    dy: Tensor, dtype: torch.dtype, shapes: Sequence[Shape], target: Target
) -> Callable[..., list[Tensor | None]]:
    """What computes every layer's dA from x and every dS side by side in one launch, which reads x once."""
    of_all: Callable[..., Any] = lora_triton_backward.grad_a(
        dy, dtype, joined(shapes), target, Choice("shared")
    )
    total, ranks = Ready(sum_partials), [shape.r for shape in shapes]

    def run(x: Tensor, ds: Tensor) -> list[Tensor | None]:
        _, da, partial = of_all(ds, None, ds, None, None, x)
        total(partial, da)
        return [*da.split(ranks)]

    return run


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    with unrecorded(tensors[0]):
        return torch.cat([*tensors], dim)
