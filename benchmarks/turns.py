"""What the CPU benchmarks share: candidates that take turns, medians, and a note of the machine."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastlora

Step = Callable[[], tuple[Tensor, ...]]

_WARM_UP_TURNS = 2


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Median and interquartile range in ms of every candidate, all timed in turns.

    Whatever else the machine does then falls on all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + _WARM_UP_TURNS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            # the first turns warm caches and allocators
            if turn >= _WARM_UP_TURNS:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        "median_ms": {name: statistics.median(values) for name, values in times.items()},
        "spread_ms": {name: _interquartile_range(values) for name, values in times.items()},
    }


def peak_bytes(step: Step) -> int:
    """The most that a step's tensors hold at once, beside what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        step()
    assert measured.profiler is not None
    assert measured.profiler.kineto_results is not None
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


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


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios."""
    return math.exp(statistics.mean(map(math.log, values)))


def environment(*packages: str) -> dict[str, Any]:
    """The machine and the versions of torch, fastlora and ``packages``."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        "fastlora": fastlora.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _interquartile_range(values: list[float]) -> float:
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[2] - quartiles[0]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
