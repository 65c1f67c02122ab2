"""Modules built on the ops."""

from fastlora.nn.attention import LoRAMultiheadAttention
from fastlora.nn.base import LoRAModule
from fastlora.nn.linear import LoRALayer, LoRALinear

__all__ = ["LoRALayer", "LoRALinear", "LoRAModule", "LoRAMultiheadAttention"]
