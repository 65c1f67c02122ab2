"""Times on a GPU: the work recorded once as a CUDA graph, replayed with a cold cache, medians."""

import statistics
from collections.abc import Callable

import torch

Timer = Callable[[Callable[[], object]], float]

_WARM_UP = 3
_REPLAYS = 25
# no card has a larger last cache
_FLUSH_BYTES = 512 * 2**20


def graph_timer(device: torch.device) -> Timer:
    """A function that takes work and returns its median time in microseconds on this GPU.

    The graph leaves out what the host takes to launch; the cache is overwritten before every replay, as other
    layers do between two calls of one.
    """
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def time(work: Callable[[], object]) -> float:
        graph = _captured(work, device)
        times: list[float] = []
        for _ in range(_REPLAYS):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)

    return time


def _captured(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
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
