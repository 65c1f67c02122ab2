"""Where and in which precision a run computes."""

from typing import Any

import torch

from fastlora._core.extras import require


def best_device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def make_accelerator(precision: str = "auto") -> Any:
    """An ``accelerate.Accelerator`` on the best device.

    Args:
        precision: ``"no"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: 16 bits where the hardware multiplies so.

    Raises:
        ImportError: ``accelerate`` is not installed.
    """
    accelerate = require("accelerate", distribution="accelerate", purpose="training")
    precision = native_precision() if precision == "auto" else precision
    state = accelerate.state.AcceleratorState
    if state._shared_state and state().mixed_precision != precision:
        # it belongs to the process, and would refuse a second training in another precision
        state._reset_state()
    # told nothing, Accelerate would let processes that torchrun starts on a CPU train each for itself
    cpu = not torch.accelerator.is_available()
    return accelerate.Accelerator(cpu=cpu, mixed_precision=precision)


def native_precision() -> str:
    """The 16 bits that the best device multiplies in: ``"bf16"`` or ``"fp16"``, or ``"no"`` for none."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # CPUs without these instructions emulate bf16, slower than they run fp32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native and not torch.backends.mps.is_available() else "no"
