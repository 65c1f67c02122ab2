"""How much memory a stretch of work needed at its peak."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATM = Path("/proc/self/statm")
_SAMPLE_SECONDS = 0.01


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
