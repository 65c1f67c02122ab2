"""What a reader needs to judge timings: device, precision, versions."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("fastlora-triton", "torch", "torchvision", "triton", "accelerate")


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Device, precision and versions: what a reader needs to judge the timings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": str(device),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
