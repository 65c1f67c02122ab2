"""A start of A and B away from zero that leaves the frozen weight alone: it is subtracted again.

PiSSA and OLoRA begin with A and B out of the weight and train W - s·B₀·A₀ + s·B·A. Kept as a second, frozen
update instead of a changed weight, that sum is exact in every dtype, the weight stays shared, and a saved
adapter is a plain one of twice the rank for the weight that everybody has. What is subtracted are two buffers
of the module that has A and B.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

START_A, START_B = "lora_start_A", "lora_start_B"
STARTS = {"lora_A": START_A, "lora_B": START_B}


def set_start(layer: nn.Module, lora_A: Tensor, lora_B: Tensor) -> None:
    """Begin with these factors ``[rank, in]`` and ``[out, rank]``; the layer computes what it does frozen."""
    own = [layer.get_parameter(name) for name in STARTS]
    with torch.no_grad():
        for parameter, values in zip(own, (lora_A, lora_B), strict=True):
            parameter.copy_(values)
    # as they were rounded, so that they cancel to the bit
    put_start(layer, own[0].detach().clone(), own[1].detach().clone())


def put_start(module: nn.Module, lora_A: Tensor, lora_B: Tensor) -> None:
    """Let this module subtract the product of two factors from its update."""
    module.register_buffer(START_A, lora_A)
    module.register_buffer(START_B, lora_B)


def take_start(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Take off what is subtracted, if anything is."""
    lora_A, lora_B = module._buffers.pop(START_A, None), module._buffers.pop(START_B, None)
    return None if lora_A is None or lora_B is None else (lora_A, lora_B)


def follow_start(layer: nn.Module, state_dict: Mapping[str, object], prefix: str) -> None:
    """Have something to subtract where a state dict with an adapter has it."""
    if all(isinstance(state_dict.get(prefix + name), Tensor) for name in STARTS.values()):
        put_start(layer, *(torch.empty_like(layer.get_parameter(name).data) for name in STARTS))
    elif f"{prefix}lora_A" in state_dict:
        take_start(layer)


def has_start(module: nn.Module) -> bool:
    """Whether something is subtracted from the update."""
    return module._buffers.get(START_A) is not None


def with_start(module: nn.Module, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B, and behind them what the module subtracts: of twice the rank then."""
    if not has_start(module):
        return lora_A, lora_B
    return join_A(lora_A, module.get_buffer(START_A)), join_B(lora_B, module.get_buffer(START_B))


def join_A(lora_A: Tensor, start: Tensor) -> Tensor:
    """A of the update and the start together ``[2·rank, in]``."""
    return torch.cat([lora_A, start])


def join_B(lora_B: Tensor, start: Tensor) -> Tensor:
    """B of both ``[out, 2·rank]``, the start's subtracted."""
    return torch.cat([lora_B, -start], dim=1)
