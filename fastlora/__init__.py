"""Parameter-efficient fine-tuning with fused kernels: exact, lean and fast on GPU and CPU."""

from fastlora import functional, reference
from fastlora._backend import set_backend, use_backend
from fastlora.inject import apply_lora, merge_adapters, remove_adapters, unmerge_adapters
from fastlora.nn import LoRALayer, LoRALinear, LoRAMultiheadAttention
from fastlora.state import load_adapter, save_adapter
from fastlora.summary import AdapterSummary, adapter_summary

__all__ = [
    "AdapterSummary",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "adapter_summary",
    "apply_lora",
    "functional",
    "load_adapter",
    "merge_adapters",
    "reference",
    "remove_adapters",
    "save_adapter",
    "set_backend",
    "unmerge_adapters",
    "use_backend",
]

__version__ = "0.1.0"
