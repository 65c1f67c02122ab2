"""Layers that keep a byte a value: bitsandbytes' LLM.int8, FP8 and int8 of transformers and others.

What they compute with is their weight alone: those that quantise their inputs, too, do so to multiply faster,
and no gradient passes through that.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastlora._core import backend
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.scaled import ScaledWeight, unreadable

_UNIT = 1.0 / 127.0
# by LLM.int8's statistics
_scales: Any = WeakIdKeyDictionary()


def read_llm_int8(layer: nn.Module) -> FrozenWeight | str:
    """The weight CB · SCB / 127 of a ``bitsandbytes.nn.Linear8bitLt``, or why it can't be read."""
    given: Any = layer
    weight: Any = layer._parameters.get("weight")
    state = given.state
    if state.has_fp16_weights:
        return "Linear8bitLt that quantises its weight on every call"
    # its first call moves them from the weight to the state
    held = weight if getattr(weight, "CB", None) is not None else state
    codes, statistics = held.CB, held.SCB
    if codes is None or statistics is None:
        return "Linear8bitLt that is not quantised yet"
    with torch._C.DisableTorchFunctionSubclass():
        factors = statistics.detach().view(-1, 1)
        if codes.shape != (given.out_features, given.in_features):
            return f"Linear8bitLt with a weight of {list(codes.shape)}"
        why = unreadable(codes, factors, (1, codes.shape[1]))
        if why is not None or codes.dtype != torch.int8 or factors.dtype != torch.float32:
            return f"Linear8bitLt {why or f'with {codes.dtype} times {factors.dtype}'}"
        known = _of_int8(statistics, factors)
        return ScaledWeight(codes.detach(), factors, (1, codes.shape[1]), unit=_UNIT, multiplied=known)


def _of_int8(statistics: Tensor, factors: Tensor) -> Tensor | None:
    """SCB / 127, computed once for each tensor, so that no call launches it; None where it can't be kept."""
    # what traces or transforms a call has to see it; changes of the other tensors can't be noticed
    if torch.compiler.is_compiling() or backend.is_watched() or not backend.are_plain(statistics):
        return None
    # nor can a CUDA graph notice them: it computes its own
    if statistics.is_inference() or (statistics.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    version = (statistics._version, statistics.data_ptr())
    known = _scales.get(statistics)
    if known is None or known[0] != version:
        with torch.inference_mode(False):
            known = _scales[statistics] = (version, factors * _UNIT)
    scales: Tensor = known[1]
    return scales


def read_transformers_fp8(layer: nn.Module) -> FrozenWeight | str:
    """The weight of transformers' ``FP8Linear``, in fp32 as its checkpoints are dequantised, or why not."""
    given: Any = layer
    block = None if given.block_size is None else tuple(given.block_size)
    return _read_fp8(layer, given.weight_scale_inv, block)


def read_compressed_fp8(layer: nn.Module) -> FrozenWeight | str:
    """The weight of transformers' ``CompressedTensorsFP8Linear``, or why it can't be read."""
    given: Any = layer
    return _read_fp8(layer, given.weight_scale.view(-1, 1), (1, given.in_features))


def _read_fp8(layer: Any, scale: Tensor, block: Any) -> FrozenWeight | str:
    name, weight = type(layer).__name__, layer._parameters.get("weight")
    if weight is None or type(weight) not in (nn.Parameter, Tensor):
        return f"{name} with a weight of class {type(weight).__name__}"
    stored, factors = weight.detach(), scale.detach()
    if stored.dtype != torch.float8_e4m3fn:
        return f"{name} with a weight in {stored.dtype}"
    if stored.shape != (layer.out_features, layer.in_features):
        return f"{name} with a weight of {list(stored.shape)}"
    if factors.numel() == 1:
        factors, block = factors.view(1, 1), tuple(stored.shape)
    if block is None:
        return f"{name} without blocks with factors {list(factors.shape)}"
    why = unreadable(stored, factors, block)
    if why is not None:
        return f"{name} {why}"
    return ScaledWeight(stored, factors, block, product=torch.float32)


def read_compressed(layer: nn.Module) -> FrozenWeight | str:
    """The weight of a linear layer that compressed-tensors has compressed, or why it can't be read."""
    given: Any = layer
    name, status = "layer of compressed-tensors", given.quantization_status
    if getattr(status, "value", status) != "compressed":
        return f"{name} that is {getattr(status, 'value', status)}, not compressed"
    arguments, parameters = given.quantization_scheme.weights, layer._parameters
    known = {"weight", "weight_scale", "bias", "input_scale", "output_scale"}
    # LoRA's stand beside them
    others = sorted(name for name in set(parameters) - known if not name.startswith("lora_"))
    if arguments is None or not arguments.symmetric or others:
        return f"{name} with {', '.join(others) or 'a zero point'}"
    weight, scale = parameters.get("weight"), parameters.get("weight_scale")
    if weight is None or scale is None or type(weight) not in (nn.Parameter, Tensor):
        return f"{name} with a weight of class {type(weight).__name__}"
    stored, factors = weight.detach(), scale.detach()
    blocks = {
        "tensor": tuple(stored.shape),
        "channel": (1, given.in_features),
        "group": (1, arguments.group_size),
        "block": tuple(arguments.block_structure or ()),
    }
    block: Any = blocks.get(getattr(arguments.strategy, "value", arguments.strategy))
    if block is None or len(block) != 2 or stored.shape != (given.out_features, given.in_features):
        return f"{name} by {arguments.strategy} with a weight of {list(stored.shape)}"
    if factors.ndim < 2:
        factors = factors.reshape(-1, 1)
    why = unreadable(stored, factors, block)
    return f"{name} {why}" if why else ScaledWeight(stored, factors, block, product=factors.dtype)
