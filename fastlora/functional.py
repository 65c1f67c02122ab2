"""The ops as functions. :mod:`fastlora.nn` holds the modules built on them."""

from fastlora.ops.adapter import adapter
from fastlora.ops.dora_linear import dora_linear, dora_weight_norm
from fastlora.ops.lora_linear import lora_linear

__all__ = ["adapter", "dora_linear", "dora_weight_norm", "lora_linear"]
