"""Peak memory and time of real training steps, each strategy in its own process so that peaks don't mix.

``python -m fastlora.transfer.costs.measure SETTINGS`` is such a process; :func:`measured` starts it.
"""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.memory import PeakMemory
from fastlora._core.text import readable_bytes
from fastlora.transfer.costs.counting import Measured
from fastlora.transfer.costs.rows import CostSettings, find_row
from fastlora.transfer.models.weightless import ModelSpec, build, sample_input

# the second step has the optimiser state that the first one makes
STEPS = 2
_STATUS = Path("/proc/self/status")
# glibc's parameter number and our value: blocks from 64 KiB on go back to the system when they are freed
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2**16
_M_MMAP_MAX, _MMAP_BLOCKS = -4, 2**20
# what glibc's own threshold grows to
_USUAL_MMAP_BYTES = 2**25


class Unmeasured(Exception):
    """A strategy's memory could not be measured; says why."""


def measured(
    spec: ModelSpec,
    row: str,
    settings: CostSettings,
    *,
    expected_bytes: int,
    device: str | None = None,
) -> Measured:
    """Peak memory and time of AdamW steps with random weights and data, in a new process.

    The peak is what the process needs beyond its state after imports and a tiny training step: the resident
    set on a CPU, what PyTorch's allocator holds on CUDA.

    Args:
        spec: The model and its batch.
        row: What trains, by its name in ``rows.ROWS``.
        settings: Sizes of what is added.
        expected_bytes: The computed sum; nothing is started that would not fit in free memory.
        device: ``"cpu"`` or ``"cuda"``; None means CUDA if there is any.

    Raises:
        Unmeasured: The memory is too small, or the process failed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    free = _free_bytes(device)
    if free is not None and expected_bytes > free:
        raise Unmeasured(
            f"needs about {readable_bytes(expected_bytes)}, {readable_bytes(free)} are free on {device}"
        )
    job = {"spec": asdict(spec), "row": row, "settings": asdict(settings), "device": device}
    command = [sys.executable, "-m", "fastlora.transfer.costs.measure", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unmeasured(f"the process ended with exit code {done.returncode}: {said}")
    return Measured(**json.loads(done.stdout))


def _free_bytes(device: str) -> int | None:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _proc_bytes(Path("/proc/meminfo"), "MemAvailable")


def _measure_here(spec: ModelSpec, row: str, settings: CostSettings, device: torch.device) -> Measured:
    _free_blocks_from(_MMAP_BYTES)
    # what the first step of a process loads and allocates once is no cost of the strategy
    toy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    _trainer(toy.to(device), torch.randn(2, 3, 4, 4))(STEPS)
    baseline = _now(device)
    peak = PeakMemory(device)
    with peak:
        model = build(spec, weightless=False)
        inputs = sample_input(spec, model)
        find_row(row).apply(model, settings, new_head=not spec.is_text)
        train = _trainer(model.to(device).train(), inputs)
        train(STEPS)
    if peak.bytes is None:
        raise OSError("expected a system with /proc to measure memory on the CPU, got one without")
    # the sampling thread may miss a short peak, the kernel's own mark doesn't
    mark = 0 if device.type == "cuda" else _proc_bytes(_STATUS, "VmHWM") or 0
    # fetching every block from the system anew would count as time of the step
    _free_blocks_from(_USUAL_MMAP_BYTES)
    train(1)
    return Measured(peak_bytes=max(peak.bytes, mark) - baseline, step_seconds=train(1))


def _trainer(model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Callable[[int], float]:
    """A function that trains a number of steps and returns their seconds."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    device = parameters[0].device

    def step() -> None:
        optimizer.zero_grad()
        if isinstance(inputs, dict):
            output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        else:
            output = model(inputs.to(device))
        torch.autograd.backward(_logits(output).logsumexp(-1).mean())
        # its graph would live on through the next forward pass
        del output
        optimizer.step()

    def train(steps: int) -> float:
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _wait_for(device)
        return time.perf_counter() - start

    return train


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found


def _now(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _proc_bytes(_STATUS, "VmRSS") or 0


def _proc_bytes(path: Path, field: str) -> int | None:
    if not path.exists():
        return None
    found = next((line for line in path.read_text().splitlines() if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _free_blocks_from(threshold: int) -> None:
    """Give freed blocks of so many bytes back to the system at once; glibc would keep them for later."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, threshold)
        libc.mallopt(_M_MMAP_MAX, _MMAP_BLOCKS)


def _main() -> None:
    job = json.loads(sys.argv[1])
    spec, settings = ModelSpec(**job["spec"]), CostSettings(**job["settings"])
    print(json.dumps(asdict(_measure_here(spec, job["row"], settings, torch.device(job["device"])))))


if __name__ == "__main__":
    _main()
