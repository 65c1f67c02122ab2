"""Modules built on the ops."""

from fastlora.nn.adapted import AdaptedModule
from fastlora.nn.adapter import AdapterLayer
from fastlora.nn.attention import LoRAMultiheadAttention
from fastlora.nn.base import LoRAModule
from fastlora.nn.conv import LoRAConv2d
from fastlora.nn.embedding import LoRAEmbedding
from fastlora.nn.gradient_reversal import GradientReversalLayer, ReversalSchedule
from fastlora.nn.layer import LoRALayer
from fastlora.nn.linear import LoRALinear
from fastlora.nn.prompts import SoftPrompts, VisualPrompts
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
