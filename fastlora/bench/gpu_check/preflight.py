"""What is here: versions, the card, its driver and clocks, and whether kernels can be launched at all."""

import os
import platform
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from fastlora._core import backend
from fastlora.bench.gpu_check.items import Found, Item
from fastlora.bench.results_file import environment_of

# of a process that compares layers of thousands of rows with float64
_PROCESS_BYTES = 6 * 2**30
_MOST_PROCESSES = 12
# what joins where it is installed
OPTIONAL = ("peft", "matplotlib", "jinja2")


def items(device: torch.device) -> Sequence[Item]:
    """One item: everything else depends on what it finds."""
    return [Item("preflight", lambda: _findings(device))]


def _findings(device: torch.device) -> Iterator[Found]:
    problem = problem_here()
    if problem:
        yield {"preflight": {"problem": problem}}
        return
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    from fastlora_kernels import targets

    target = targets.detect(device)
    environment: dict[str, Any] = environment_of("gpu") | {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "plans": f"as {target.card}" if target.tiles != "default" else "none: library products",
        "platform": platform.platform(),
        "absent": [name for name in OPTIONAL if find_spec(name) is None],
    }
    yield {
        "preflight": {
            "device": properties.name,
            "environment": environment,
            "processes": processes(os.cpu_count() or 1, free),
        }
    }


def problem_here() -> str:
    """Why nothing can be checked here; empty where all is well."""
    if not torch.cuda.is_available():
        return (
            "expected a CUDA or ROCm device, and torch "
            f"{torch.__version__} finds none here; fastlora plan predicts for GPUs that are elsewhere"
        )
    if not backend.triton_available():
        return "expected the package triton, and it is not installed; torch's CUDA wheels bring it"
    if backend.interpreter_enabled():
        return "expected TRITON_INTERPRET to be unset: with it, kernels run in Triton's interpreter; unset it"
    return backend.launch_failure()


def processes(cores: int, free_bytes: int) -> int:
    """How many processes compare results at once.

    Example:
        >>> processes(16, 79 * 2**30), processes(4, 79 * 2**30), processes(16, 10 * 2**30)
        (12, 4, 1)
    """
    return max(1, min(cores, _MOST_PROCESSES, free_bytes // _PROCESS_BYTES))
