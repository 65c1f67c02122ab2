"""Parameter-efficient fine-tuning with fused kernels: exact, lean and fast on GPU and CPU."""

from typing import TYPE_CHECKING

from fastlora._core.lazy import shown_lazily
from fastlora._version import __version__ as __version__

if TYPE_CHECKING:
    from fastlora import functional, init, reference
    from fastlora._core.backend import set_backend, use_backend
    from fastlora.domain.model import DomainAdaptationModel
    from fastlora.inject.adapters import apply_adapters
    from fastlora.inject.combining import add_weighted_adapter
    from fastlora.inject.lora import apply_lora, remove_adapters
    from fastlora.inject.merging import merge_adapters, unmerge_adapters
    from fastlora.inject.named import adapter_names, add_adapter, delete_adapter, set_adapter
    from fastlora.inject.prompts import apply_prompts, remove_prompts
    from fastlora.inject.summary import AdapterSummary, adapter_summary
    from fastlora.interop.peft import accelerate, restore
    from fastlora.nn import (
        AdaptedModule,
        AdapterLayer,
        GradientReversalLayer,
        LoRAConv2d,
        LoRAEmbedding,
        LoRALayer,
        LoRALinear,
        LoRAMultiheadAttention,
        ReversalSchedule,
        SoftPrompts,
        VisualPrompts,
    )
    from fastlora.ops.gradient_reversal import GradientReversal, gradient_reversal
    from fastlora.parameters import ParameterReport, parameter_report
    from fastlora.state.load import load_adapter
    from fastlora.state.save import save_adapter
    from fastlora.transfer.create import create_transfer_model
    from fastlora.transfer.models.wrapper import TransferLearningModel

__all__ = [
    "AdaptedModule",
    "AdapterLayer",
    "AdapterSummary",
    "DomainAdaptationModel",
    "GradientReversal",
    "GradientReversalLayer",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "ParameterReport",
    "ReversalSchedule",
    "SoftPrompts",
    "TransferLearningModel",
    "VisualPrompts",
    "accelerate",
    "adapter_names",
    "adapter_summary",
    "add_adapter",
    "add_weighted_adapter",
    "apply_adapters",
    "apply_lora",
    "apply_prompts",
    "create_transfer_model",
    "delete_adapter",
    "functional",
    "gradient_reversal",
    "init",
    "load_adapter",
    "merge_adapters",
    "parameter_report",
    "reference",
    "remove_adapters",
    "remove_prompts",
    "restore",
    "save_adapter",
    "set_adapter",
    "set_backend",
    "unmerge_adapters",
    "use_backend",
]

if not TYPE_CHECKING:
    # torch takes seconds to import, which a command's --help and a mistyped path needn't wait for
    __getattr__, __dir__ = shown_lazily(
        __name__,
        {
            "_core.backend": ("set_backend", "use_backend"),
            "inject.adapters": ("apply_adapters",),
            "domain.model": ("DomainAdaptationModel",),
            "functional": (),
            "init": (),
            "inject.lora": ("apply_lora", "remove_adapters"),
            "inject.merging": ("merge_adapters", "unmerge_adapters"),
            "interop.peft": ("accelerate", "restore"),
            "inject.combining": ("add_weighted_adapter",),
            "inject.named": ("adapter_names", "add_adapter", "delete_adapter", "set_adapter"),
            "state.load": ("load_adapter",),
            "nn": (
                "AdaptedModule",
                "AdapterLayer",
                "GradientReversalLayer",
                "LoRAConv2d",
                "LoRAEmbedding",
                "LoRALayer",
                "LoRALinear",
                "LoRAMultiheadAttention",
                "ReversalSchedule",
                "SoftPrompts",
                "VisualPrompts",
            ),
            "ops.gradient_reversal": ("GradientReversal", "gradient_reversal"),
            "parameters": ("ParameterReport", "parameter_report"),
            "inject.prompts": ("apply_prompts", "remove_prompts"),
            "reference": (),
            "state.save": ("save_adapter",),
            "inject.summary": ("AdapterSummary", "adapter_summary"),
            "transfer.create": ("create_transfer_model",),
            "transfer.models.wrapper": ("TransferLearningModel",),
        },
    )
