"""The ops as functions. :mod:`fastlora.nn` holds the modules built on them."""

from fastlora.ops.adapter import adapter
from fastlora.ops.chunked_cross_entropy import chunked_cross_entropy
from fastlora.ops.dora_linear import dora_linear, dora_weight_norm
from fastlora.ops.gated_lora_linear import gated_lora_linear
from fastlora.ops.lora_linear import lora_linear
from fastlora.ops.shared_lora_linear import Projection, shared_lora_linear

__all__ = [
    "Projection",
    "adapter",
    "chunked_cross_entropy",
    "dora_linear",
    "dora_weight_norm",
    "gated_lora_linear",
    "lora_linear",
    "shared_lora_linear",
]
