"""Modules built on the ops."""

from fastlora.nn.adapted import AdaptedModule
from fastlora.nn.adapter import AdapterLayer
from fastlora.nn.gradient_reversal import GradientReversalLayer, ReversalSchedule
from fastlora.nn.lora.attention import LoRAMultiheadAttention
from fastlora.nn.lora.base import LoRAModule
from fastlora.nn.lora.conv import LoRAConv2d
from fastlora.nn.lora.embedding import LoRAEmbedding
from fastlora.nn.lora.layer import LoRALayer
from fastlora.nn.lora.linear import LoRALinear
from fastlora.nn.prompts.modules import SoftPrompts, VisualPrompts
from fastlora.nn.tuner import TunerModule

__all__ = [
    "AdaptedModule",
    "AdapterLayer",
    "GradientReversalLayer",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAModule",
    "LoRAMultiheadAttention",
    "ReversalSchedule",
    "SoftPrompts",
    "TunerModule",
    "VisualPrompts",
]
