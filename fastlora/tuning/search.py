"""Check and time every candidate of a layer call, and keep the fastest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastlora.tuning.calls import LayerCall
from fastlora.tuning.candidates import (
    Tensors,
    choices,
    draw,
    run_backward,
    run_eager,
    run_forward,
    unpacked,
)
from fastlora.tuning.timing import Timer
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import REFERENCE, Choice, Record
from fastlora_kernels.compiled import tile_text

# as in the tests: eager's own error in the same dtype, times this
_FACTOR = 2.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LeftOut:
    """A candidate that was not timed.

    Attributes:
        candidate: Pass, path and tile of the candidate.
        reason: What went wrong.
        wrong: Whether its result is wrong, rather than the GPU too small for it.
    """

    candidate: str
    reason: str
    wrong: bool


class WrongResult(RuntimeError):
    """A candidate computes something else than the eager formula."""


_LEFT_OUT = (WrongResult, OutOfResources, torch.OutOfMemoryError)


def tune_call(
    call: LayerCall, device: torch.device, timer: Timer, progress: Progress
) -> tuple[Record, list[LeftOut]]:
    """Time every candidate for one call, each checked first.

    Eager competes with its whole step, forward and backward: what one pass of it keeps, only the other reads.

    Args:
        call: The layer call.
        device: The GPU.
        timer: Takes work, returns microseconds.
        progress: Told of every candidate.

    Returns:
        The winners, with every candidate's time; and the candidates that were left out.
    """
    tensors = draw(call, device)
    _, s, mask = run_forward(tensors, Choice("split"))
    tensors = replace(tensors, s=s, mask=mask)
    keep = None if mask is None else unpacked(mask, call.inputs)
    exact = run_eager(tensors.to(torch.float64), keep=keep)
    eager = run_eager(tensors, keep=keep)
    times: dict[Pass, dict[Choice, float]] = {"forward": {}, "backward": {}}
    left_out = []
    for part, found in times.items():
        slices = slice(0, 1) if part == "forward" else slice(1, 4)
        for choice in choices(part, call, device):
            progress(f"{part} {name_of(choice)}")
            work = _work(part, tensors, choice)
            try:
                _check(work(), eager[slices], exact[slices])
                found[choice] = timer(work)
            except _LEFT_OUT as error:
                wrong = isinstance(error, WrongResult)
                left_out.append(LeftOut(f"{part} {name_of(choice)}", str(error), wrong))
    progress("eager")
    step = timer(lambda: run_eager(tensors))
    return _record(call, times, step), left_out


def name_of(choice: Choice) -> str:
    """Path and tile in words."""
    return choice.path if choice.tile is None else f"{choice.path} {tile_text(choice.tile)}"


def _work(part: Pass, tensors: Tensors, choice: Choice) -> Callable[[], Sequence[Tensor]]:
    if part == "forward":
        return lambda: run_forward(tensors, choice)[:1]
    return lambda: run_backward(tensors, choice)


def _check(got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for value, theirs, truth in zip(got, eager, exact, strict=True):
        error, allowed = ((each.double() - truth).norm() for each in (value, theirs))
        rounding = torch.finfo(value.dtype).eps / 2 * truth.norm()
        if not error <= _FACTOR * allowed + rounding:
            raise WrongResult(f"errs by {float(error):.2e} where eager errs by {float(allowed):.2e}")


def _record(call: LayerCall, times: dict[Pass, dict[Choice, float]], step: float) -> Record:
    best = {part: min(found, key=lambda each: found[each]) for part, found in times.items() if found}
    complete = best.keys() == times.keys()
    fused = sum(times[part][choice] for part, choice in best.items()) if complete else math.inf
    if step < fused:
        best = dict.fromkeys(times, Choice(REFERENCE))
    named: dict[str, dict[str, float]] = {
        part: {name_of(choice): time for choice, time in found.items()} for part, found in times.items()
    }
    named["step"] = {"eager": step, "fused": fused}
    return Record(
        shape=call.shape,
        dtype=call.dtype,
        dropping=call.dropout > 0,
        forward=best["forward"],
        backward=best["backward"],
        microseconds=named,
    )
