"""What autocast means for an op that rounds and accumulates by itself."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast would compute in for this tensor; None where it does not apply."""
    device_type = tensor.device.type
    # asking about a device that knows no autocast, meta for one, is an error in torch
    if tensor.dtype == torch.float64 or device_type == "meta":
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


_AS_IT_IS = contextlib.nullcontext()


def unrecorded(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given and autograd records nothing.

    Entering ``torch.no_grad`` once more than needed would cost a tenth of a small call.
    """
    if autocast_dtype(tensor) is None:
        return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS
    contexts = contextlib.ExitStack()
    contexts.enter_context(torch.no_grad())
    contexts.enter_context(without_autocast(tensor))
    return contexts


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given."""
    if autocast_dtype(tensor) is None:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
