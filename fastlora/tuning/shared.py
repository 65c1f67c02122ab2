"""Check and time every candidate of the backward pass of layers that share their input."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastlora.ops import kernel_paths, shared_triton
from fastlora.ops.decide import Paths
from fastlora.tuning.calls import LayerCall, SharedCall
from fastlora.tuning.candidates import SCALING, Tensors, draw, run_forward, shape_of, unpacked
from fastlora.tuning.search import Attempts, LeftOut, Progress, name_of
from fastlora.tuning.timing import Timer, Times
from fastlora.tuning.truth import Truth, truths_of_sum
from fastlora_kernels import targets
from fastlora_kernels.choose.tuned import Choice, SharedRecord, shared_choices

# gradients of x, and of each A and B
_Gradients = tuple[Tensor, list[tuple[Tensor, Tensor]]]


def tune_shared(
    call: SharedCall, device: torch.device, timer: Timer, progress: Progress
) -> tuple[SharedRecord | None, list[LeftOut]]:
    """Measure one call's backward pass; forward, every layer takes what won for it alone.

    Args:
        call: The call. Its layers one by one take what is kept for each: tune these first.
        device: The GPU that is here.
        timer: Gives a piece of work's times.
        progress: Is told what is being done.

    Returns:
        The winners of both ways to run, with every candidate's time, or None where nothing could be timed;
        and the candidates that were left out.

    Raises:
        GpuLostError: The GPU does not answer after a candidate has failed.
    """
    attempt = Attempts(device, progress)
    prepared = attempt("everything", lambda: _prepared(call, device))
    if prepared is None:
        return None, attempt.left_out
    layers, truths = prepared
    times: dict[Choice, Times] = {}
    for choice in choices_of(call, device):
        run = partial(_checked_times, layers, choice, truths, timer)
        taken = attempt(f"backward {name_of(choice)}", run)
        if taken is not None:
            times[choice] = taken
    if not times:
        return None, attempt.left_out
    in_graph = min(times, key=lambda choice: times[choice].in_graph)
    from_host = min(times, key=lambda choice: times[choice].from_host)
    microseconds = {
        "graph": {name_of(choice): taken.in_graph for choice, taken in times.items()},
        "host": {name_of(choice): taken.from_host for choice, taken in times.items()},
    }
    first = call.layers[0]
    named = (call.shapes, first.dtype, first.dropout > 0)
    return SharedRecord(*named, in_graph, from_host, microseconds), attempt.left_out


def choices_of(call: SharedCall, device: torch.device) -> list[Choice]:
    """Every path and tile that can serve a call on this GPU; one alone where nothing is to be chosen."""
    first, target = call.layers[0], targets.detect(device)
    return shared_choices(call.shapes, first.torch_dtype, target, dropping=first.dropout > 0)


def draw_shared(calls: Sequence[LayerCall], device: torch.device) -> list[Tensors]:
    """Random tensors of layers on one x, with S and a mask of each as its forward pass leaves them.

    Args:
        calls: A call of each layer, of the same rows, inputs, dropout and dtype.
        device: Where they lie.
    """
    drawn = [draw(call, device) for call in calls]
    return [
        _with_forward(replace(each, x=drawn[0].x, seed=None if each.seed is None else each.seed + number))
        for number, each in enumerate(drawn)
    ]


def keeps_of(layers: Sequence[Tensors]) -> list[Tensor | None]:
    """Each layer's dropout mask as bool ``[rows, inputs]``; None without dropout."""
    return [None if each.mask is None else unpacked(each.mask, each.x.shape[1]) for each in layers]


def work_of(layers: Sequence[Tensors], choice: Choice, *, in_graph: bool = False) -> Callable[[], _Gradients]:
    """What computes dX, and each layer's dA and dB, by the op on this path.

    Args:
        layers: What :func:`draw_shared` gives.
        choice: Path and tile.
        in_graph: Whether layers that are computed one by one take what won in CUDA graphs.
    """
    given = [
        t for each in layers for t in (each.dy, each.weight, each.lora_A, each.lora_B, each.s, each.mask)
    ]
    settings = tuple(
        shared_triton.Layer(SCALING, each.dropout, True, True, _paths(each, in_graph)) for each in layers
    )

    def work() -> _Gradients:
        dx, das, dbs = shared_triton.backward(*given, layers[0].x, layers=settings, choice=choice)
        # all are wanted
        return dx, [(da, db) for da, db in zip(das, dbs, strict=True) if da is not None and db is not None]

    return work


def _paths(layer: Tensors, in_graph: bool) -> Paths:
    shape, x = shape_of(layer), layer.x
    dropping = layer.mask is not None
    chosen = kernel_paths.choose("backward", shape, x.dtype, x.device, dropping=dropping, in_graph=in_graph)
    return Paths(shape, chosen, chosen, in_graph)


def _with_forward(layer: Tensors) -> Tensors:
    _, s, mask = run_forward(layer, Choice("split"))
    return replace(layer, s=s, mask=mask)


def _prepared(call: SharedCall, device: torch.device) -> tuple[list[Tensors], list[Truth]]:
    """The layers' tensors, and what their gradients are compared with."""
    layers = draw_shared(call.layers, device)
    return layers, truths_of_sum(layers, keeps_of(layers))


def _checked_times(layers: Sequence[Tensors], choice: Choice, truths: Sequence[Truth], timer: Timer) -> Times:
    """Of each way to run with what its layers take there."""
    # together, layers take nothing of their own
    ways = (True, False) if choice.path == "separate" else (True,)
    works = [work_of(layers, choice, in_graph=in_graph) for in_graph in ways]
    for work in works:
        dx, others = work()
        for number, (truth, pair) in enumerate(zip(truths, others, strict=True)):
            truth.check(pair if number else (dx, *pair), first=2 if number else 1)
    graph, *host = map(timer, works)
    return Times(graph.in_graph, host[0].from_host) if host else graph
