"""The forward pass of LoRA layers that share their input: S of all in one launch, or a launch for each."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch

from fastlora_kernels.choose import lora, paths
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.paths import Candidate
from fastlora_kernels.choose.shared import joined
from fastlora_kernels.predict.launches import Launch
from fastlora_kernels.shared.kernels import MOST_LAYERS, SHARED_DOWN
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Plan, Shape, cdiv

# one launch of ours that reads x once; or each layer as it is planned alone
SharedForwardPath = Literal["shared", "separate"]


@functools.lru_cache(maxsize=8192)
def choose_shared_forward_path(
    shapes: tuple[Shape, ...], dtype: torch.dtype, target: Target, *, dropping: bool
) -> SharedForwardPath:
    """The path with the lowest predicted time.

    Args:
        shapes: Sizes of each layer's call, the same rows and inputs in all.
        dtype: The dtype of x.
        target: The GPU.
        dropping: Whether dropout is active, in each of them.
    """
    if any(0 in (shape.m, shape.n, shape.k) for shape in shapes):
        return "separate"
    found = shared_forward_candidates([Call(shape, dtype, target, dropping) for shape in shapes])
    return cast(SharedForwardPath, paths.fastest(found).path)


def shared_forward_candidates(calls: Sequence[Call]) -> list[Candidate]:
    """Both paths of the forward pass; the shared one with the reason where it can't serve.

    Args:
        calls: A call of each layer, all of the same rows, inputs, dtype, GPU and dropout.
    """
    alone = [paths.candidates("forward", call) for call in calls]
    # what hinders every kernel of ours
    why = next(
        (each.refused for found in alone for each in found if each.path == "epilogue" and each.refused), ""
    )
    if not 2 <= len(calls) <= MOST_LAYERS:
        why = f"it takes from 2 to {MOST_LAYERS} layers"
    shared = Candidate("shared", why) if why else Candidate("shared", "", _shared(calls))
    separate = [launch for found in alone for launch in paths.fastest(found).launches]
    return [shared, Candidate("separate", "", separate)]


def shared_down_plan(shapes: Sequence[Shape], dtype: torch.dtype, target: Target) -> Plan:
    """The plan of the launch that computes S of all layers.

    Args:
        shapes: Sizes of each layer's call.
        dtype: The dtype of x.
        target: The GPU.
    """
    # a rank that can't be read in wide words settles how many are read at a time
    rank = next((shape.r for shape in shapes if shape.r % 16), max(shape.r for shape in shapes))
    return plans.choose(SHARED_DOWN, replace(joined(shapes), r=rank), dtype, target)


def _shared(calls: Sequence[Call]) -> list[Launch]:
    first, shapes = calls[0], [call.shape for call in calls]
    plan = shared_down_plan(shapes, first.dtype, first.target)
    reads = cdiv(max(shape.r for shape in shapes), plan.tile.rank)
    together = replace(first, shape=joined(shapes))
    down = lora.down_by(SHARED_DOWN, together, plan, reads=reads, masks=len(calls))
    return [*down, *(launch for call in calls for launch in _from_s(call))]


def _from_s(call: Call) -> list[Launch]:
    """What fills a layer's y once its S is there: no path is left that makes its own, as with dropout."""
    dropping = replace(call, dropping=True)
    found = paths.fastest(paths.candidates("forward", dropping))
    return found.launches[len(lora.down(dropping)) :]
