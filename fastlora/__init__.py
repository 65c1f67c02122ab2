"""Parameter-efficient fine-tuning with fused kernels: exact, lean and fast on GPU and CPU."""

from typing import TYPE_CHECKING, Any

from fastlora import functional, init, reference
from fastlora._backend import set_backend, use_backend
from fastlora._version import __version__ as __version__
from fastlora.adapters import apply_adapters
from fastlora.domain.model import DomainAdaptationModel
from fastlora.inject import apply_lora, merge_adapters, remove_adapters, unmerge_adapters
from fastlora.interop.peft import accelerate, restore
from fastlora.named import (
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    delete_adapter,
    load_adapter,
    set_adapter,
)
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
from fastlora.prompting import apply_prompts, remove_prompts
from fastlora.state import save_adapter
from fastlora.summary import AdapterSummary, adapter_summary
from fastlora.transfer.model import TransferLearningModel

if TYPE_CHECKING:
    from fastlora.transfer.create import create_transfer_model

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


def __getattr__(name: str) -> Any:
    # torchvision takes as long to import as all of the above, and only this needs it
    if name == "create_transfer_model":
        from fastlora.transfer.create import create_transfer_model

        return create_transfer_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
