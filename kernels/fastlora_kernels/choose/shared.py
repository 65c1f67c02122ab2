"""The backward pass of LoRA layers that share their input: dX in one launch, or summed where it lies."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

import torch

from fastlora_kernels.choose import lora, paths
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.paths import Candidate
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora import kernels
from fastlora_kernels.predict.launches import Launch, kernel_product, library_product, stream
from fastlora_kernels.predict.occupancy import programs_at_once
from fastlora_kernels.shared.kernels import MOST_LAYERS, SHARED_GRAD_X
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import TILES_PER_GROUP, Plan, Shape, Tile, cdiv

# one launch of ours; library products into the same dX, the low-rank ones added to it by a kernel; or each
# layer as it is planned alone, and its dX added
SharedPath = Literal["shared", "epilogue", "separate"]
SHARED_PATHS: tuple[SharedPath, ...] = get_args(SharedPath)
# launches of a layer alone, by the names that the cost model has for them
_BASE, _SUM, _ADD_MASKED = "dY·W", "sum dA, dB", "dX + masked"


@functools.lru_cache(maxsize=8192)
def choose_shared_path(
    shapes: tuple[Shape, ...], dtype: torch.dtype, target: Target, *, dropping: bool
) -> SharedPath:
    """The path with the lowest predicted time.

    Args:
        shapes: Sizes of each layer's call, the same rows and inputs in all.
        dtype: The dtype of x.
        target: The GPU.
        dropping: Whether dropout is active, in each of them.
    """
    if any(0 in (shape.m, shape.n, shape.k) for shape in shapes):
        return "separate"
    found = shared_candidates([Call(shape, dtype, target, dropping) for shape in shapes])
    return cast(SharedPath, paths.fastest(found).path)


def shared_candidates(calls: Sequence[Call]) -> list[Candidate]:
    """Every path of the backward pass, those that can't serve it with the reason.

    Args:
        calls: A call of each layer, all of the same rows, inputs, dtype, GPU and dropout.
    """
    alone = [paths.candidates("backward", call) for call in calls]
    refused = {
        path: next(
            (each.refused for found in alone for each in found if each.path == of and each.refused), ""
        )
        # what hinders a large product of ours, and the kernel that adds to one of the library's
        for path, of in (("shared", "split"), ("epilogue", "epilogue"))
    }
    if not 2 <= len(calls) <= MOST_LAYERS:
        refused = dict.fromkeys(refused, f"it takes from 2 to {MOST_LAYERS} layers")
    makers = {"shared": _shared, "epilogue": _epilogue}
    found = [
        Candidate(path, why) if (why := refused[path]) else Candidate(path, "", make(calls))
        for path, make in makers.items()
    ]
    launches = [launch for each in alone for launch in paths.fastest(each).launches]
    return [*found, Candidate("separate", "", [*launches, *added(calls)])]


def summed_by_library(calls: Sequence[Call]) -> Candidate:
    """The backward pass where no kernel is meant for any of the layers: library products summed in one dX.

    Args:
        calls: A call of each layer, all of the same rows, inputs, dtype, GPU and dropout.
    """
    alone = [lora.backward("library", call) for call in calls]
    if calls[0].dropping:
        # the first one's low-rank term is where the others are added
        (first, *others), left_out = alone, (_BASE, _ADD_MASKED)
        of_first = [launch for launch in first if launch.name not in left_out]
        of_others = [launch for each in others for launch in each if launch.name != _BASE]
        return Candidate("library", "", [*of_first, *of_others, *_summed(calls, filled=True)])
    together = replace(calls[0], shape=joined([call.shape for call in calls]))
    of_layers = [launch for each in alone for launch in each if launch.name in ("dS", "dB")]
    of_all = [each for each in lora.backward("library", together) if each.name in ("dA", "dX + dS·A")]
    return Candidate("library", "", [*of_layers, *_summed(calls), _side_by_side(together), *of_all])


def shared_plan(
    shapes: Sequence[Shape], dtype: torch.dtype, target: Target, *, tile: Tile | None = None
) -> Plan:
    """The plan of the launch that computes dX of all layers.

    Args:
        shapes: Sizes of each layer's call.
        dtype: The dtype of x.
        target: The GPU.
        tile: One that was measured to be the fastest; without it, the one predicted to be.
    """
    return plans.choose(SHARED_GRAD_X, replace(joined(shapes), r=_rank(shapes)), dtype, target, tile=tile)


def shared_tiles(shapes: Sequence[Shape], dtype: torch.dtype, target: Target) -> list[Tile]:
    """Every tile of that launch.

    Args:
        shapes: Sizes of each layer's call.
        dtype: The dtype of x.
        target: The GPU.
    """
    aligned = joined(shapes).aligned
    return list(dict.fromkeys(plans.tiles(SHARED_GRAD_X, _rank(shapes), dtype, target, aligned=aligned)))


def joins_ranks(shapes: Sequence[Shape], *, dropping: bool) -> bool:
    """Whether the low-rank products of all layers are one over the sum of their ranks: x is read once for dA.

    Args:
        shapes: Sizes of each layer's call.
        dropping: Whether dropout is active: every layer has a mask of its own.
    """
    return not dropping and sum(shape.r for shape in shapes) % 16 == 0


def joined(shapes: Sequence[Shape]) -> Shape:
    """All layers as one, of the sum of their outputs and ranks."""
    outputs, ranks = sum(shape.n for shape in shapes), sum(shape.r for shape in shapes)
    aligned = all(shape.aligned for shape in shapes)
    return Shape(m=shapes[0].m, n=outputs, k=shapes[0].k, r=ranks, aligned=aligned)


def _rank(shapes: Sequence[Shape]) -> int:
    # a rank that can't be read in wide words settles how many are read at a time
    return next((shape.r for shape in shapes if shape.r % 16), max(shape.r for shape in shapes))


def _shared(calls: Sequence[Call]) -> list[Launch]:
    return [*_grads_s_b(calls), _product(calls), *_of_ranks(calls, kernels.LORA_GRAD_A), *_sums(calls)]


def _epilogue(calls: Sequence[Call]) -> list[Launch]:
    low_rank = [*_of_ranks(calls, kernels.LORA_ADD), *_of_ranks(calls, kernels.LORA_GRAD_A)]
    return [*_grads_s_b(calls), *_summed(calls), *low_rank, *_sums(calls)]


def _summed(calls: Sequence[Call], *, filled: bool = False) -> list[Launch]:
    """The library's products, each added to dX; the first one fills it where it isn't filled before."""
    (m, k), b, target = (calls[0].shape.m, calls[0].shape.k), calls[0].itemsize, calls[0].target
    return [
        library_product(
            "dX + dY·W", m, k, call.shape.n, b, target, extra_bytes=call.x_bytes if i or filled else 0
        )
        for i, call in enumerate(calls)
    ]


def _product(calls: Sequence[Call]) -> Launch:
    """dX of all layers in one launch."""
    first, shapes = calls[0], [call.shape for call in calls]
    tile = shared_plan(shapes, first.dtype, first.target).tile
    depth = sum(cdiv(shape.n, tile.depth) * tile.depth for shape in shapes)
    ranks = sum(cdiv(shape.r, tile.rank) * tile.rank for shape in shapes)
    small = sum(call.s_bytes + call.mask_bytes + call.shape.r * call.shape.k * 4 for call in calls)
    name, dropping = SHARED_GRAD_X.name, first.dropping
    return kernel_product(
        name, first.shape.m, first.shape.k, depth, first.itemsize, tile, first.target, group=TILES_PER_GROUP,
        at_once=programs_at_once(name, tile, first.dtype, first.target, dropping=dropping),
        low_rank=ranks, loops=len(calls), extra_bytes=small,
    )  # fmt: skip


def _grads_s_b(calls: Sequence[Call]) -> list[Launch]:
    """dS and dB of each layer."""
    others = (kernels.LORA_GRAD_A.name, kernels.LORA_ADD.name, _BASE, _SUM)
    return [launch for call in calls for launch in _alone(call) if launch.name not in others]


def _sums(calls: Sequence[Call]) -> list[Launch]:
    return [launch for call in calls for launch in _alone(call) if launch.name == _SUM]


def _of_ranks(calls: Sequence[Call], kernel: Kernel) -> list[Launch]:
    """A kernel's launches: one for the ranks of all layers where they are joined, else one for each."""
    shapes = [call.shape for call in calls]
    if not joins_ranks(shapes, dropping=calls[0].dropping):
        return [launch for call in calls for launch in _alone(call) if launch.name == kernel.name]
    together = replace(calls[0], shape=joined(shapes))
    return [_side_by_side(together), *(launch for launch in _alone(together) if launch.name == kernel.name)]


def _side_by_side(together: Call) -> Launch:
    return stream("dS or A side by side", 2 * together.s_bytes, together.target, from_library=True)


def _alone(call: Call) -> list[Launch]:
    return lora.backward("epilogue", call)


def added(calls: Sequence[Call]) -> list[Launch]:
    """The sums of each layer's own dX, as autograd has them.

    Args:
        calls: A call of each layer.
    """
    return [stream("dX + dX", 3 * call.x_bytes, call.target, from_library=True) for call in calls[1:]]
