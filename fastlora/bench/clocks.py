"""How a step is timed on a GPU: its own time, or that of calls one after another with the host's part."""

import math
import time

import torch

from fastlora.bench.turns import Clock, Step

# no card has a larger last cache than half of this
LEAST_FLUSH_BYTES = 256 * 2**20
# so long a series of calls takes at least, in ms: the wait at its end is nothing beside it
_SERIES_MS = 10.0
_LEAST_CALLS, _MOST_CALLS = 3, 50


def make_gpu_clock() -> Clock:
    """A clock of CUDA events around a step whose operands were driven out of the L2 cache before."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # at least twice the cache; the long write also lets the host run ahead of the GPU
    size = max(4 * getattr(properties, "L2_cache_size", 0), LEAST_FLUSH_BYTES)
    flush = torch.empty(size, dtype=torch.int8, device="cuda")

    def clock(step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return clock


def make_calls_clock(usual: Step) -> Clock:
    """A clock of calls one after another, as a training loop makes them: the host's time or the GPU's.

    Whichever is longer shows, because a host that is ahead launches while the GPU computes.

    Args:
        usual: A step whose time says how many calls a series takes; it is called a few times.
    """
    # the first call compiles
    usual()
    about_ms = _calls_clock(_LEAST_CALLS)(usual)
    return _calls_clock(min(_MOST_CALLS, max(_LEAST_CALLS, math.ceil(_SERIES_MS / about_ms))))


def _calls_clock(calls: int) -> Clock:
    def clock(step: Step) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / calls

    return clock
