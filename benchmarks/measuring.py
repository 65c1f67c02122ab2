"""How a case is measured: timed in turns inside pytest-benchmark, its memory counted."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlora.bench.cases import Case
from fastlora.bench.checked import BOUNDS
from fastlora.bench.clocks import make_gpu_clock
from fastlora.bench.results import OURS
from fastlora.bench.turns import WARM_UP_TURNS, Step, Turns, cpu_clock, gpu_peak_bytes, peak_bytes

# a step this long in ms needs fewer rounds
_LONG = 400.0


def time_in_turns(benchmark: Any, case: Case, steps: Mapping[str, Step], rounds: int) -> dict[str, Any]:
    """Medians and spreads of all candidates; pytest-benchmark's own statistics are fastlora's.

    Each round's setup times all the other candidates, so that they alternate with it.
    """
    clock = cpu_clock if case.device == "cpu" else make_gpu_clock()
    turns = Turns(steps, clock)
    others = [name for name in steps if name != OURS]
    # the fastest of a few is enough to know how long a round takes
    longest = min(clock(steps[OURS]) for _ in range(2))
    benchmark.pedantic(
        turns.take,
        args=(OURS,),
        setup=_doing(lambda: turns.take(*others)),
        rounds=rounds if longest < _LONG else max(5, rounds // 2),
        warmup_rounds=WARM_UP_TURNS,
    )
    return turns.result()


def _doing(action: Callable[[], None]) -> Callable[[], None]:
    """pytest-benchmark takes what its setup returns for arguments."""

    def setup() -> None:
        action()

    return setup


def memory(case: Case, steps: Mapping[str, Step], given: Iterable[Tensor]) -> dict[str, dict[str, int]]:
    """Bytes that each candidate keeps for backward, and the most its step holds, beside what is there anyway.

    Args:
        given: Inputs, gradients and weights, which are there before the step.
    """
    outside = {tensor.untyped_storage().data_ptr() for tensor in given}
    names = [name for name in steps if name not in BOUNDS]
    return {
        "kept_bytes": {name: kept_bytes(steps[name], outside) for name in names},
        "peak_bytes": peaks(case, {name: steps[name] for name in names}),
    }


def peaks(case: Case, steps: Mapping[str, Step]) -> dict[str, int]:
    """The most that each step's tensors hold at once, beside what was there before it, in bytes."""
    peak = peak_bytes if case.device == "cpu" else gpu_peak_bytes
    return {name: peak(step) for name, step in steps.items()}


def kept_bytes(step: Step, outside: set[int]) -> int:
    """Bytes of the storages kept for backward, without those that begin at the addresses ``outside``."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())
