"""Check and time every candidate of a layer call, and keep the fastest."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.tuning.calls import LayerCall
from fastlora.tuning.candidates import (
    Tensors,
    choices,
    draw,
    run_backward,
    run_eager,
    run_forward,
    run_step,
    unpacked,
)
from fastlora.tuning.timing import Timer, Times
from fastlora.tuning.truth import Truth, truth_of
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import REFERENCE, Choice, Record, Winners
from fastlora_kernels.compiled import tile_text

Progress = Callable[[str], None]
_LONGEST = 400
_Made = TypeVar("_Made")
_PassTimes = Mapping[Pass, Mapping[Choice, Times]]


@dataclass(frozen=True)
class LeftOut:
    """A candidate that was not timed.

    Attributes:
        candidate: Pass, path and tile of the candidate; ``everything`` where the call itself failed.
        reason: What went wrong.
        wrong: Whether the fault is the candidate's, rather than that the GPU is too small for it.
    """

    candidate: str
    reason: str
    wrong: bool


class GpuLostError(OSError):
    """A candidate has left the GPU in a state in which it answers no more."""


@dataclass(frozen=True)
class Attempts:
    """Runs what may fail, and notes what did."""

    device: torch.device
    progress: Progress
    left_out: list[LeftOut] = field(default_factory=list)

    def __call__(self, candidate: str, work: Callable[[], _Made]) -> _Made | None:
        """What work makes; None where it fails.

        Args:
            candidate: Pass, path and tile.
            work: What is tried.

        Raises:
            GpuLostError: The GPU does not answer after it has failed.
        """
        self.progress(candidate)
        try:
            return work()
        # compilers, assemblers and drivers raise what they like
        except Exception as error:
            reason, wrong = _in_short(error), not isinstance(error, _too_large())
        self.left_out.append(LeftOut(candidate, reason, wrong))
        if not answers(self.device):
            raise GpuLostError(
                f"the GPU no longer answers after {candidate} ({reason}); what was measured before is kept: "
                "start again, without this call"
            )
        return None


def answers(device: torch.device) -> bool:
    """Whether a GPU still computes; what a failed candidate took is given back."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def tune_call(
    call: LayerCall, device: torch.device, timer: Timer, progress: Progress
) -> tuple[Record | None, list[LeftOut]]:
    """Time every candidate for one call, each checked first, as a CUDA graph and where the host launches.

    y and dX are checked on 512 rows spread over the call, dA and dB as a whole, all against float64. Eager
    competes with its whole step, forward and backward: what one pass of it keeps, only the other reads.

    Args:
        call: The layer call.
        device: The GPU.
        timer: Takes work, returns its times.
        progress: Told of every candidate.

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
    tensors, truths = prepared
    times: dict[Pass, dict[Choice, Times]] = {"forward": {}, "backward": {}}
    for part, found in times.items():
        for choice in choices(part, call, device):
            truth = truths[tensors.unrounded_by(choice)]
            run = functools.partial(_checked_times, part, tensors, choice, truth, timer)
            taken = attempt(f"{part} {name_of(choice)}", run)
            if taken is not None:
                found[choice] = taken
    # over a quantised weight it would keep a dense one, and is no candidate
    eager = attempt("eager", lambda: timer(lambda: run_eager(tensors))) if tensors.stored is None else None

    @functools.cache
    def step(forward: Choice, backward: Choice) -> Times | None:
        return attempt("both passes", lambda: timer(lambda: run_step(tensors, forward, backward)))

    graph, host = (_winners(way, times, eager, step) for way in Times._fields)
    if graph is None or host is None:
        return None, attempt.left_out
    won = (graph.forward, graph.backward, graph.microseconds)
    named = (call.shape, call.dtype, call.dropout > 0)
    return Record(*named, *won, from_host=host, weight=call.weight), attempt.left_out


def name_of(choice: Choice) -> str:
    """Path and tile in words."""
    return choice.path if choice.tile is None else f"{choice.path} {tile_text(choice.tile)}"


def _prepared(call: LayerCall, device: torch.device) -> tuple[Tensors, dict[bool, Truth]]:
    """The call's tensors, and what paths that round W, and those that don't, are compared with."""
    tensors = draw(call, device)
    _, s, mask = run_forward(tensors, Choice("split"))
    keep = None if mask is None else unpacked(mask, call.inputs)
    kinds = {False, *(tensors.unrounded_by(choice) for choice in choices("forward", call, device))}
    truths = {kind: truth_of(tensors, keep, unrounded=kind) for kind in kinds}
    return replace(tensors, s=s, mask=mask), truths


def _checked_times(part: Pass, tensors: Tensors, choice: Choice, truth: Truth, timer: Timer) -> Times:
    def work() -> Sequence[Tensor]:
        return run_forward(tensors, choice)[:1] if part == "forward" else run_backward(tensors, choice)

    truth.check(work(), first=0 if part == "forward" else 1)
    return timer(work)


def _winners(
    way: str,
    times: _PassTimes,
    eager: Times | None,
    step: Callable[[Choice, Choice], Times | None],
) -> Winners | None:
    """What won in one of the two ways to run; None where neither eager nor a pair of passes could run."""

    def us(taken: Times | None) -> float:
        return math.inf if taken is None else getattr(taken, way)

    best = [min(found, key=lambda each: us(found[each]), default=None) for found in times.values()]
    forward, backward = best
    fused = us(step(forward, backward)) if forward is not None and backward is not None else math.inf
    if us(eager) == fused == math.inf:
        return None
    microseconds: dict[str, dict[str, float]] = {
        part: {name_of(each): us(taken) for each, taken in found.items()} for part, found in times.items()
    }
    # what could not run has no time: JSON knows no infinity
    microseconds["step"] = {
        name: taken for name, taken in (("eager", us(eager)), ("fused", fused)) if taken < math.inf
    }
    if forward is None or backward is None or us(eager) < fused:
        forward = backward = Choice(REFERENCE)
    return Winners(forward, backward, microseconds)


def _in_short(error: Exception) -> str:
    # a compiler quotes the source first and says at the end what is wrong with it
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST // 2]} … {words[-_LONGEST // 2 :]}"


@functools.cache
def _too_large() -> tuple[type[Exception], ...]:
    # Triton is not installed everywhere
    from triton.runtime.errors import OutOfResources

    return OutOfResources, torch.OutOfMemoryError
