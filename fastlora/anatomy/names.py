"""Finding modules by the names a user knows, whatever wraps them."""

from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn

from fastlora.nn import AdaptedModule, AdapterLayer, LoRAModule, LoRAMultiheadAttention
from fastlora.nn.adapted import WRAPPED
from fastlora.nn.prompts.modules import PROMPTS, PromptModule
from fastlora.nn.tuner import TunerModule

Model = TypeVar("Model", bound=nn.Module)

# name parts that torch.compile, activation checkpointing, FSDP1 and our adapters put in between
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", WRAPPED}


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside ``torch.compile`` and data-parallel wrappers.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}; give the model itself")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def clean_name(name: str) -> str:
    """A module or state-dict name without the parts that wrappers add.

    Example:
        >>> clean_name("blocks.0._checkpoint_wrapped_module.fc1")
        'blocks.0.fc1'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under every name it has; the inner one where a wrapper shares its name."""
    return {clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that a request may name: not the model itself, nor the parts of an adapter."""
    adapters = (module for module in model.modules() if isinstance(module, AdapterLayer))
    ours = {id(part) for adapter in adapters for part in adapter.modules()}
    return {name: m for name, m in named_modules(model).items() if name and id(m) not in ours}


def adapted_modules(model: nn.Module) -> dict[str, AdaptedModule]:
    """Every module with a bottleneck adapter once, by its first name."""
    modules = model.named_modules()
    return {clean_name(name): module for name, module in modules if isinstance(module, AdaptedModule)}


def prompt_modules(model: nn.Module) -> dict[str, PromptModule]:
    """The prompts of every transformer that has some, once, by their first name."""
    found: dict[str, PromptModule] = {}
    for name, module in model.named_modules():
        prompts = module._modules.get(PROMPTS)
        if isinstance(prompts, PromptModule):
            found[clean_name(f"{name}.{PROMPTS}".lstrip("."))] = prompts
    return found


def lora_layers(model: nn.Module) -> dict[str, LoRAModule]:
    """Every LoRA layer once, by its first name; an attention's ``out_proj`` belongs to the attention."""
    found: dict[str, LoRAModule] = {}
    inner: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoRAModule) and id(module) not in inner:
            found[clean_name(name)] = module
            if isinstance(module, LoRAMultiheadAttention):
                inner.update(map(id, module.children()))
    return found


@dataclass(frozen=True)
class Added:
    """What fastlora has added to a model, each once, by its first name.

    Attributes:
        layers: LoRA layers; an attention's ``out_proj`` belongs to the attention.
        places: Modules with a bottleneck adapter.
        prompts: The prompts of transformers.
    """

    layers: dict[str, LoRAModule]
    places: dict[str, AdaptedModule]
    prompts: dict[str, PromptModule]

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.layers or self.places or self.prompts)


def added(model: nn.Module) -> Added:
    """Everything that fastlora has added to a model."""
    return Added(lora_layers(model), adapted_modules(model), prompt_modules(model))


def require_lora_layers(model: nn.Module) -> dict[str, LoRAModule]:
    """:func:`lora_layers`, or a clear error.

    Raises:
        ValueError: There is none.
    """
    here = added(model)
    others = [("bottleneck adapters", "remove_adapters")] if here.places else []
    others += [("prompts", "remove_prompts")] if here.prompts else []
    if not here.layers and others:
        raise ValueError(
            f"expected LoRA layers, got {' and '.join(kind for kind, _ in others)} alone, which have no "
            "weight that they could be folded into; keep them, or take them out with "
            + " and ".join(f"fastlora.{remover}" for _, remover in others)
        )
    if not here.layers:
        raise ValueError(
            f"expected a model with LoRA layers, got {type(model).__name__} without any; "
            "add them with fastlora.apply_lora or fastlora.load_adapter"
        )
    return here.layers


def tuner_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that fastlora added: A and B, adapters, prompts."""
    return [
        module.get_parameter(name)
        for module in model.modules()
        if isinstance(module, TunerModule)
        for name in module.adapter_params()
    ]


def holds_tuner(model: nn.Module) -> bool:
    """Whether fastlora has added anything to a model."""
    return any(isinstance(module, TunerModule) for module in model.modules())


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each value where its key stands, everywhere in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent.register_module(name, replacements[child])


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU, gathered first if it is sharded (FSDP2's DTensor)."""
    gather = getattr(tensor, "full_tensor", None)
    whole = tensor if gather is None else gather()
    return cast(torch.Tensor, whole).detach().to("cpu", copy=True).contiguous()
