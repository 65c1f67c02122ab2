"""Parameter groups with real learning rates: slower towards the input, no decay where it does harm."""

from typing import Any

from torch import nn

from fastlora._core.option_checks import check_number, check_positive
from fastlora.anatomy.stages import parts_of, stages
from fastlora.nn.prompts.modules import PromptModule

_UNDECAYED = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, PromptModule)
# learned inputs, not weights: decay would pull them to zero for nothing
_TOKENS = ("class_token", "cls_token", "reg_token", "dist_token", "pos_embed", "position_embedding")
_LORA_B = ("lora_B", "lora_embedding_B")


def parameter_groups(
    model: nn.Module,
    head: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    head_factor: float = 1.0,
    lora_plus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimiser with decoupled weight decay, such as ``torch.optim.AdamW``.

    Every parameter is in one group from the start, frozen ones too: unfreezing a stage switches its groups
    on, so schedulers and checkpoints always see the same groups. An optimiser leaves a parameter without
    gradient as it is. ``lr`` is written into each group, so every scheduler of torch scales it.

    A stage k before the head learns at ``lr · layer_decay^k``, the last one at k = 1 (BEiT,
    https://arxiv.org/abs/2106.08254, and timm count so too), the head at ``lr · head_factor``. LoRA's B
    learns ``lora_plus_ratio`` times faster than the rest of its stage (LoRA+,
    https://arxiv.org/abs/2402.12354). Norms, biases, other vectors and learned tokens have no weight decay.

    Args:
        model: With everything that should ever train, adapters included.
        head: The part of the model that is its classifier, or an ``nn.ModuleList`` of such parts.
        lr: Learning rate of the head before ``head_factor``.
        weight_decay: Decay of matrices and convolutions.
        layer_decay: In (0, 1]; 0.65 to 0.9 is usual for full fine-tuning of transformers.
        head_factor: A fresh head usually wants 10.
        lora_plus_ratio: 16 in the paper; 1 switches it off.

    Returns:
        Dicts of ``params``, ``lr``, ``weight_decay`` and ``name``, from the stem to the head.

    Raises:
        ValueError: A number out of range, or ``head`` is no part of ``model``.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18(num_classes=2)
        >>> groups = parameter_groups(model, model.fc, lr=0.1, layer_decay=0.5, head_factor=10)
        >>> [(group["name"], group["lr"]) for group in groups][-3:]
        [('layer4.no_decay', 0.05), ('head', 1.0), ('head.no_decay', 1.0)]
    """
    _check(lr, weight_decay, layer_decay, head_factor, lora_plus_ratio)
    if not {id(part) for part in parts_of(head)} <= {id(module) for module in model.modules()}:
        raise ValueError(f"expected head to be a module of {type(model).__name__}, got another one")
    kinds = _kinds(model)
    parts = stages(model, head)
    rates = [lr * layer_decay ** (len(parts) - index) for index in range(len(parts))]
    owners = [(part.name, rate, list(part.all_parameters())) for part, rate in zip(parts, rates, strict=True)]
    owners.append(("head", lr * head_factor, list(head.parameters())))

    groups: dict[str, dict[str, Any]] = {}
    unseen = set(model.parameters())
    for owner, rate, parameters in owners:
        for kind in ("", ".no_decay", ".lora_B"):
            # a parameter that two stages share learns with the first
            chosen = [p for p in dict.fromkeys(parameters) if kinds[p] == kind and p in unseen]
            unseen -= set(chosen)
            if chosen:
                groups[owner + kind] = {
                    "params": chosen,
                    "lr": rate * (lora_plus_ratio if kind == ".lora_B" else 1.0),
                    "weight_decay": 0.0 if kind == ".no_decay" else weight_decay,
                    "name": owner + kind,
                }
    return list(groups.values())


def _kinds(model: nn.Module) -> dict[nn.Parameter, str]:
    kinds: dict[nn.Parameter, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}"
            if any(part in _LORA_B for part in path.split(".")):
                kind = ".lora_B"
            elif isinstance(module, _UNDECAYED) or parameter.dim() <= 1 or any(t in name for t in _TOKENS):
                kind = ".no_decay"
            else:
                kind = ""
            kinds.setdefault(parameter, kind)
    return kinds


def _check(
    lr: float, weight_decay: float, layer_decay: float, head_factor: float, lora_plus_ratio: float
) -> None:
    positive = {"lr": lr, "head_factor": head_factor, "lora_plus_ratio": lora_plus_ratio}
    for name, value in positive.items():
        check_positive(name, value, "leave it out for the usual" if name != "lr" else "1e-3 is usual")
    for name, value in (("weight_decay", weight_decay), ("layer_decay", layer_decay)):
        check_number(name, value, "leave it out for the usual")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"expected weight_decay of 0 or more, got {weight_decay!r}; 0.05 is usual")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"expected layer_decay above 0 and at most 1, got {layer_decay!r}; 0.75 is usual")
