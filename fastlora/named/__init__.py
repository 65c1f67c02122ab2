"""Several named adapters in one model."""

from fastlora.named.combining import add_weighted_adapter
from fastlora.named.loading import load_adapter
from fastlora.named.switching import adapter_names, add_adapter, delete_adapter, set_adapter

__all__ = [
    "adapter_names",
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "load_adapter",
    "set_adapter",
]
