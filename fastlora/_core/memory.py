"""How much memory a stretch of work needed at its peak."""

import os
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_SAMPLE_SECONDS = 0.01


def check_fits(needed: int, device: torch.device, *, half: bool = False) -> None:
    """Refuse training that can't fit into memory, before the operating system kills it without a word.

    Args:
        needed: Bytes, as ``parameter_report`` predicts them in float32.
        device: Where the work runs.
        half: Whether activations are kept in 16 bits, which the prediction doesn't know.

    Raises:
        ValueError: The device has less memory.
    """
    total = _total(device)
    if total is not None and needed > total * (2 if half else 1):
        raise ValueError(
            f"expected training that fits into the {total / 2**30:,.1f} GiB of {device}, got one that is "
            f"predicted to take {needed / 2**30:,.1f} GiB; lower batch_size or image_size, or raise "
            "accumulation"
        )


def _total(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    table = dict(re.findall(r"^(MemTotal|SwapTotal): +(\d+) kB", _MEMINFO.read_text(), flags=re.MULTILINE))
    return sum(1024 * int(size) for size in table.values())


class PeakMemory:
    """The highest memory use while inside ``with`` blocks; re-entered, it keeps the highest of all.

    On CUDA it is the device memory held by tensors, from PyTorch's allocator. Elsewhere it is the resident
    set of the whole process (PyTorch itself included), which a thread samples from ``/proc`` every 10 ms; on
    systems without ``/proc`` it stays None.

    Args:
        device: Where the work runs.

    Attributes:
        bytes: The peak so far, or None where it can't be measured.

    Example:
        >>> peak = PeakMemory(torch.device("cpu"))
        >>> with peak:
        ...     block = bytearray(1000)
    """

    def __init__(self, device: torch.device) -> None:
        """See the class."""
        self.bytes: int | None = None
        self._device = device
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start measuring."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _STATM.exists():
            self._stop.clear()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop measuring."""
        if self._device.type == "cuda":
            self._record(torch.cuda.max_memory_allocated(self._device))
        elif self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            self._sampler = None

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            self._record(int(_STATM.read_text().split()[1]) * page)
            if self._stop.wait(_SAMPLE_SECONDS):
                return

    def _record(self, measured: int) -> None:
        self.bytes = max(measured, self.bytes or 0)


class HeldMemory:
    """The most that tensors hold at once inside a ``with`` block, beside what was there before it.

    On CUDA it comes from PyTorch's allocator, elsewhere from PyTorch's profiler, which slows the block down
    and sees what is allocated on the CPU. Neither PyTorch itself counts nor what an allocator keeps.

    Args:
        device: Where the work runs.

    Attributes:
        bytes: The peak, known after the block.

    Example:
        >>> with HeldMemory(torch.device("cpu")) as held:
        ...     numbers = torch.zeros(1000)
        >>> held.bytes >= 4000
        True
    """

    def __init__(self, device: torch.device) -> None:
        """See the class."""
        self.bytes = 0
        self._cuda = device if device.type == "cuda" else None
        self._before = 0
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        """Start measuring."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop measuring."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            self.bytes = torch.cuda.max_memory_allocated(self._cuda) - self._before
        elif self._profile is not None:
            self._profile.__exit__(kind, error, trace)
            self.bytes = _highest(self._profile)
            self._profile = None


def _highest(measured: Any) -> int:
    # torch's types lack the bytes
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
