"""A start of A and B away from zero that leaves the frozen weight alone: it is subtracted again.

PiSSA and OLoRA begin with A and B out of the weight and train W - s·B₀·A₀ + s·B·A. Kept as a second, frozen
update instead of a changed weight, that sum is exact in every dtype, the weight stays shared, and a saved
adapter is a plain one of twice the rank for the weight that everybody has.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora.nn.settings import LoRASettings

if TYPE_CHECKING:
    from fastlora.nn.lora.base import LoRAModule

START_A, START_B = "lora_start_A", "lora_start_B"
_STARTS = {"lora_A": START_A, "lora_B": START_B}


def set_start(layer: "LoRAModule", lora_A: Tensor, lora_B: Tensor) -> None:
    """Begin with these factors ``[rank, in]`` and ``[out, rank]``; the layer computes what it does frozen."""
    for parameter, values in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
        with torch.no_grad():
            parameter.copy_(values)
    # as they were rounded, so that they cancel to the bit
    put_start(layer, layer.lora_A.detach().clone(), layer.lora_B.detach().clone())


def put_start(layer: "LoRAModule", lora_A: Tensor, lora_B: Tensor) -> None:
    """What is subtracted from the update of this layer."""
    layer.register_buffer(START_A, lora_A)
    layer.register_buffer(START_B, lora_B)


def take_start(layer: "LoRAModule") -> tuple[Tensor, Tensor] | None:
    """Take off what is subtracted, if anything is."""
    lora_A, lora_B = layer._buffers.pop(START_A, None), layer._buffers.pop(START_B, None)
    return None if lora_A is None or lora_B is None else (lora_A, lora_B)


def follow_start(layer: "LoRAModule", state_dict: Mapping[str, object], prefix: str) -> None:
    """Have something to subtract where a state dict with an adapter has it."""
    given = [state_dict.get(prefix + name) for name in (START_A, START_B)]
    if isinstance(given[0], Tensor) and isinstance(given[1], Tensor):
        put_start(layer, torch.empty_like(layer.lora_A.data), torch.empty_like(layer.lora_B.data))
    elif f"{prefix}lora_A" in state_dict:
        take_start(layer)


def has_start(layer: "LoRAModule") -> bool:
    """Whether something is subtracted from the update."""
    return layer._buffers.get(START_A) is not None


def factors(layer: "LoRAModule") -> tuple[Tensor, Tensor]:
    """A and B that the layer computes with: with a start, of twice the rank."""
    if not has_start(layer):
        return layer.lora_A, layer.lora_B
    return join(layer.lora_A, layer.get_buffer(START_A)), join_B(layer.lora_B, layer.get_buffer(START_B))


def join(lora_A: Tensor, start: Tensor) -> Tensor:
    """A of the update and the start together ``[2·rank, in]``."""
    return torch.cat([lora_A, start])


def join_B(lora_B: Tensor, start: Tensor) -> Tensor:
    """B of both ``[out, 2·rank]``, the start's subtracted."""
    return torch.cat([lora_B, -start], dim=1)


def file_part(layer: "LoRAModule", part: str) -> Tensor:
    """A parameter as an adapter file holds it."""
    parameter = layer.get_parameter(part)
    if part not in _STARTS or not has_start(layer):
        return parameter
    start = layer.get_buffer(_STARTS[part])
    return join(parameter, start) if part == "lora_A" else join_B(parameter, start)


def fill_part(layer: "LoRAModule", part: str, values: Tensor) -> None:
    """Set a parameter, and the start's half, to what an adapter file holds."""
    if part in _STARTS and has_start(layer):
        dim = 0 if part == "lora_A" else 1
        values, start = values.chunk(2, dim)
        layer.get_buffer(_STARTS[part]).copy_(start if part == "lora_A" else -start)
    layer.get_parameter(part).copy_(values)


def file_settings(layer: "LoRAModule") -> LoRASettings:
    """Rank and alpha of the adapter that a file holds, with the same scaling."""
    rank, alpha = layer.rank, layer.alpha
    if has_start(layer):
        rank, alpha = 2 * rank, alpha * (math.sqrt(2) if layer.rslora else 2)
    return LoRASettings(rank, alpha, layer.lora_dropout, layer.rslora, dora=layer.dora)


def fill_alpha(layer: "LoRAModule", alpha: float, *, rslora: bool) -> None:
    """Set the scaling that goes with a file's alpha."""
    layer.rslora = rslora
    layer.alpha = alpha / (math.sqrt(2) if rslora else 2) if has_start(layer) else alpha
