"""Times on a GPU: of the work recorded as a CUDA graph, and of the same where the host launches it."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Medians of one piece of work, in microseconds.

    Attributes:
        in_graph: As a CUDA graph, replayed with a cold cache; the host's time does not count.
        from_host: Where the host launches every kernel: its time or the GPU's, whichever is longer, because
            a host that is ahead launches while the GPU computes.
    """

    in_graph: float
    from_host: float


Timer = Callable[[Callable[[], object]], Times]

_WARM_UP = 3
_REPEATS = 25
# no card has a larger last cache
_FLUSH_BYTES = 512 * 2**20


def gpu_timer(device: torch.device) -> Timer:
    """A function that takes work and returns its median times on this GPU.

    The cache is overwritten before every replay, as other layers do between two calls of one.
    """
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def times(work: Callable[[], object]) -> Times:
        graph = captured(work, device)
        replays: list[float] = []
        for _ in range(_REPEATS):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            replays.append(start.elapsed_time(end) * 1e3)
        in_graph = statistics.median(replays)
        return Times(in_graph, max(in_graph, host_us(work, device)))

    return times


def host_us(work: Callable[[], object], device: torch.device) -> float:
    """Median microseconds until the host has launched the work, on an idle GPU.

    Args:
        work: What launches.
        device: The GPU that is waited for between two launches.
    """
    taken: list[float] = []
    for _ in range(_WARM_UP + _REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        taken.append((time.perf_counter() - start) * 1e6)
    return statistics.median(taken[_WARM_UP:])


def captured(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """The work as a CUDA graph, after a few calls outside of it.

    Args:
        work: What launches; it must not wait for the GPU.
        device: The GPU.
    """
    # kernels compile and libraries allocate on the first calls, which must not happen while recording
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
