"""The tensors of an adapter file: what each is called, and what of a layer it holds.

A start that is subtracted (:mod:`fastlora.nn.lora.start`) is a part of A and B in a file, which then holds a
plain adapter of twice the rank.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastlora.nn import LoRALayer, LoRAModule
from fastlora.nn.adapted import ADAPTER
from fastlora.nn.lora.layout import lora_parts
from fastlora.nn.lora.start import STARTS, has_start, join_A, join_B
from fastlora.nn.settings import LoRASettings

PREFIX = "base_model.model."
# PEFT wraps nn.MultiheadAttention and leaves the output projection inside the wrapped layer
OUT_PROJ = ".base_layer.out_proj"
LORA_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.(?:lora_[AB]\.weight|lora_embedding_[AB])")


def tensor_slots(name: str, layer: nn.Module, *, dora: bool) -> list[tuple[str, nn.Module, str]]:
    """File key, owner and attribute of every A, B and magnitude of one layer, adapted or about to be."""
    pairs = [(name, layer)]
    if isinstance(layer, nn.MultiheadAttention):
        pairs.append((name + OUT_PROJ, layer.out_proj))
    return [
        (f"{PREFIX}{key}.{part}" + (".weight" if part in ("lora_A", "lora_B") else ""), owner, part)
        for key, owner in pairs
        for part in lora_parts(plain_layer(owner), rank=1, dora=dora)
    ]


def adapter_key(name: str, part: str) -> str:
    """File key of one parameter of the bottleneck adapter at this place."""
    return f"{PREFIX}{name}.{ADAPTER}.{part}"


def prompt_key(name: str) -> str:
    """File key of the tokens of these prompts."""
    return f"{PREFIX}{name}.tokens"


def plain_layer(owner: nn.Module) -> nn.Module:
    """The layer whose kind says what an update looks like: itself, or what it stands around."""
    return owner.original_layer if isinstance(owner, LoRALayer) else owner


def file_dtype(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> torch.dtype:
    """What these tensors of a file have in common: a loaded adapter keeps its dtype."""
    return functools.reduce(torch.promote_types, (tensors[key].dtype for key in keys))


def file_part(layer: nn.Module, part: str) -> Tensor:
    """A parameter of a LoRA layer as a file holds it."""
    parameter = layer.get_parameter(part)
    if part not in STARTS or not has_start(layer):
        return parameter
    start = layer.get_buffer(STARTS[part])
    return join_A(parameter, start) if part == "lora_A" else join_B(parameter, start)


def fill_part(layer: nn.Module, part: str, values: Tensor) -> None:
    """Set a parameter of a LoRA layer, and the start's half, to what a file holds."""
    if part in STARTS and has_start(layer):
        dim = 0 if part == "lora_A" else 1
        values, start = values.chunk(2, dim)
        layer.get_buffer(STARTS[part]).copy_(start if part == "lora_A" else -start)
    layer.get_parameter(part).copy_(values)


def file_settings(layer: LoRAModule) -> LoRASettings:
    """What the adapter in a file is, with the layer's scaling; its dtype is that of its tensors."""
    settings = replace(layer._settings(), adapter_dtype=None)
    if not has_start(layer):
        return settings
    doubled = math.sqrt(2) if settings.rslora else 2
    return replace(settings, rank=2 * settings.rank, alpha=doubled * settings.alpha)


def fill_alpha(layer: LoRAModule, alpha: float, *, rslora: bool) -> None:
    """Set the scaling that goes with a file's alpha."""
    layer.rslora = rslora
    layer.alpha = alpha / (math.sqrt(2) if rslora else 2) if has_start(layer) else alpha
