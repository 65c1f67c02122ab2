"""What a check of a card asks of torch beside launches, on a machine without one: clocks, graphs, memory."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

_GIB = 2**30


class Event:
    """A point in time of the host's: nothing runs elsewhere."""

    def __init__(self, *, enable_timing: bool) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, other: "Event") -> float:
        # a clock too coarse for nothing at all would make a median of 0
        return max(1e-6, (other._at - self._at) * 1e3)


class Graph:
    """Launches that were made while it was captured; none is made again."""

    def replay(self) -> None:
        """Nothing."""


class Stream:
    """A stream beside the current one."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None:
        """There is nothing to wait for."""

    def is_capturing(self) -> bool:
        """Optimisers ask."""
        return False


@contextlib.contextmanager
def _entered(*given: Any) -> Iterator[None]:
    yield


def pretend() -> None:
    """Give torch what it lacks without a GPU; the stage has to be installed."""
    cuda: Any = torch.cuda
    cuda.Event, cuda.CUDAGraph, cuda.Stream = Event, Graph, Stream
    cuda.graph = cuda.stream = _entered
    accelerator: Any = torch.accelerator
    cuda.current_stream = accelerator.current_stream = Stream
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *given: None)
    cuda.is_current_stream_capturing = lambda: False
    for name in ("memory_allocated", "max_memory_allocated"):
        setattr(cuda, name, lambda *given: 0)
    cuda.mem_get_info = lambda *given: (79 * _GIB, 80 * _GIB)
    whole: Any = torch
    whole.compile = lambda function, **options: function
    tensor: Any = torch.Tensor
    tensor.to = _on_the_cpu(torch.Tensor.to)


def _on_the_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    def there(value: Any) -> Any:
        return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value

    def moved(tensor: Any, *arguments: Any, **options: Any) -> Any:
        return to(tensor, *map(there, arguments), **{name: there(value) for name, value in options.items()})

    return moved
