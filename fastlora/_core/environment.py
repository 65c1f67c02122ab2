"""What a reader needs to judge timings: device, precision, versions."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("fastlora-triton", "torch", "torchvision", "triton", "accelerate")


def environment(device: torch.device, precision: str, *packages: str) -> dict[str, Any]:
    """Device, precision and versions, of ``packages`` too: what a reader needs to judge the timings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in (*_PACKAGES, *packages)},
    }


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
