"""What all benchmarks share: candidates that take turns, the check before it, and a note of the machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fastlora._core.environment import processor
from fastlora._core.memory import HeldMemory
from fastlora._version import __version__

Step = Callable[[], tuple[Tensor, ...]]
# a step's time in ms
Clock = Callable[[Step], float]

WARM_UP_TURNS = 2


def cpu_clock(step: Step) -> float:
    """Wall time of a step on the CPU, in ms."""
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


class Turns:
    """Times candidates in turns, so that whatever else the machine does falls on all of them alike.

    Args:
        steps: What each candidate does.
        clock: Measures one step.
    """

    def __init__(self, steps: Mapping[str, Step], clock: Clock = cpu_clock) -> None:
        """See the class."""
        self._steps, self._clock = steps, clock
        self._times: dict[str, list[float]] = {name: [] for name in steps}

    def take(self, *names: str) -> None:
        """Let these candidates have their turn."""
        for name in names:
            self._times[name].append(self._clock(self._steps[name]))

    def result(self) -> dict[str, dict[str, float]]:
        """Median and interquartile range in ms of every candidate."""
        # the first turns warm caches and allocators
        timed = {name: values[WARM_UP_TURNS:] or values for name, values in self._times.items()}
        return {
            "median_ms": {name: statistics.median(values) for name, values in timed.items()},
            "spread_ms": {name: _interquartile_range(values) for name, values in timed.items()},
        }


def take_turns(
    steps: Mapping[str, Step], rounds: int, clock: Clock = cpu_clock
) -> dict[str, dict[str, float]]:
    """Median and interquartile range in ms of every candidate, all timed in turns.

    Args:
        steps: What each candidate does.
        rounds: How often each has its turn, beside the turns that warm up.
        clock: Measures one step.
    """
    turns = Turns(steps, clock)
    for _ in range(rounds + WARM_UP_TURNS):
        turns.take(*steps)
    return turns.result()


def peak_bytes(step: Step) -> int:
    """The most that a step's tensors hold at once on the CPU, beside what was there before it."""
    with HeldMemory(torch.device("cpu")) as held:
        step()
    return held.bytes


def gpu_peak_bytes(step: Step) -> int:
    """The most that a step's tensors hold at once on the current GPU, beside what was there before it."""
    with HeldMemory(torch.device("cuda")) as held:
        step()
    return held.bytes


def check_equal(name: str, got: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Refuse to time a candidate that computes something else.

    Raises:
        RuntimeError: An error relative to the expected tensor's largest element exceeds ``tolerance``.
    """
    for index, (value, wanted) in enumerate(zip(got, expected, strict=True)):
        error = (value.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        if not error <= tolerance:
            raise RuntimeError(
                f"{name}: result {index} differs from the reference by {error:.1e}; not timing it"
            )


def environment(*packages: str) -> dict[str, Any]:
    """The machine and the versions of torch, fastlora and ``packages``."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in packages},
        "fastlora": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _interquartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[2] - quartiles[0]
