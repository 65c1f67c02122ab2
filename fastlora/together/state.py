"""What a layer's output depends on, to be compared at two times."""

from typing import Any

import torch
from torch import Tensor

from fastlora._core import backend
from fastlora.ops.runtime import autocast_dtype
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.together.parts import Parts


def of_layer(parts: Parts) -> Any:
    """All that an output depends on, of a layer, to be compared."""
    weight = parts.weight
    stored = weight.tensors if isinstance(weight, FrozenWeight) else (weight,)
    adapters = [(*map(_state, adapter[:3]), *adapter[3:5]) for adapter in parts.adapters]
    return [*map(_state, (*stored, parts.bias)), *adapters]


def of_call(x: Tensor) -> Any:
    """All that an output depends on beside the layer."""
    autograd: Any = torch._C._autograd
    # of a checkpoint, or of whoever moves what is kept elsewhere
    hooks = autograd._top_saved_tensors_default_hooks(True)
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return _state(x), torch.is_grad_enabled(), autocast_dtype(x), backend.selected(), hooks, stream


def _state(tensor: Tensor | None) -> Any:
    """What tells whether a tensor's values, or its part in autograd, have changed."""
    if tensor is None:
        return None
    # an inference tensor counts no changes: it is equal to nothing
    version = object() if tensor.is_inference() else tensor._version
    # another Parameter of the same memory has a gradient of its own
    which = id(tensor) if tensor.requires_grad else None
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, which
