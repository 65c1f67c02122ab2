"""State of a model and an optimiser as whole tensors on the CPU, whether they are sharded or not."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def whole(value: Any) -> Any:
    """Tensors inside containers, gathered and copied to the CPU; every process has to ask."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(inner) for inner in value)
    return value


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    target.detach().copy_(_like(target, value))


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what :func:`whole` made of an optimiser's ``state_dict``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {
        index: {name: _placed(parameters[index], entry) for name, entry in entries.items()}
        for index, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": placed})


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _placed(parameter: Tensor, entry: Any) -> Any:
    # step counters have no dimensions and stay whole
    return _like(parameter, entry) if isinstance(entry, Tensor) and entry.dim() else entry


def _like(target: Tensor, value: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
