"""The tensors of an adapter file: what each is called there and in a model, and what of a layer it holds.

A start that is subtracted (:mod:`fastlora.nn.lora.start`) is a part of A and B in a file, which then holds a
plain adapter of twice the rank.
"""

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastlora.anatomy.names import clean_name, named_modules
from fastlora.nn import LoRALayer, LoRAModule
from fastlora.nn.adapted import ADAPTER
from fastlora.nn.lora.layout import lora_parts
from fastlora.nn.lora.start import STARTS, has_start, join_A, join_B
from fastlora.state.folder import AdapterFile

PREFIX = "base_model.model."
# PEFT wraps nn.MultiheadAttention and leaves the output projection inside the wrapped layer
OUT_PROJ = ".base_layer.out_proj"
LORA_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.(?:lora_[AB]\.weight|lora_embedding_[AB])")
_PARALLEL = "module."


def in_model_names(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """A file's tensors under the keys of an unwrapped model; the config knows what they were called before.

    PEFT keeps what ``torch.compile``, data parallelism and activation checkpointing put into names, and its
    own prefix where a model was wrapped twice.

    Raises:
        ValueError: Two keys mean the same tensor, or a model wrapped twice has layers that the config, which
            is the outer one's, does not name.
    """
    tensors, config = file.tensors, file.config
    own = {name.partition(".")[0] for name in named_modules(model)}
    keys = {key: _model_key(key, own) for key in tensors}
    first: dict[str, str] = {}
    for key, model_key in keys.items():
        if first.setdefault(model_key, key) != key:
            raise ValueError(
                f"expected one tensor for {model_key}, got {first[model_key]} and {key}; save it again"
            )
    renamed = {keys[key]: tensor for key, tensor in tensors.items()}
    if config.lora is None:
        return replace(file, tensors=renamed)
    file_names = {
        new[1]: old[1]
        for key in tensors
        if (old := LORA_KEY.fullmatch(key)) and (new := LORA_KEY.fullmatch(keys[key])) and old[1] != new[1]
    }
    twice = [old for old in file_names.values() if old.startswith(PREFIX) and not config.lora.targets(old)]
    if twice:
        raise ValueError(
            f"expected the adapter of one PeftModel, got one put around another: {twice[0]!r} first is not "
            "among target_modules, so rank and alpha of the inner one are not in the file; save the inner "
            "one by itself"
        )
    config = replace(config, lora=replace(config.lora, file_names=file_names))
    return replace(file, tensors=renamed, config=config)


def _model_key(key: str, own: Collection[str]) -> str:
    rest = key.removeprefix(_PARALLEL)
    if not rest.startswith(PREFIX):
        return key
    rest = clean_name(rest.removeprefix(PREFIX))
    while rest.partition(".")[0] not in own:
        shorter = clean_name(rest.removeprefix(_PARALLEL).removeprefix(PREFIX))
        if shorter == rest:
            break
        rest = shorter
    return PREFIX + rest


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


def fill_alpha(layer: LoRAModule, alpha: float, *, rslora: bool) -> None:
    """Set the scaling that goes with a file's alpha."""
    layer.rslora = rslora
    layer.alpha = alpha / (math.sqrt(2) if rslora else 2) if has_start(layer) else alpha
