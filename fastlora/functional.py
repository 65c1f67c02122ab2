"""The ops as functions. :mod:`fastlora.nn` holds the modules built on them."""

from fastlora.ops.adapter import adapter
from fastlora.ops.lora_linear import lora_linear

__all__ = ["adapter", "lora_linear"]
