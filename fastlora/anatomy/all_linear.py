"""What ``"all-linear"`` means in a model: its linear layers, but not its head, and what it does not reach."""

import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import nn

from fastlora._core.log import logger
from fastlora.anatomy.names import clean_name
from fastlora.anatomy.stages import head as find_head

# Hugging Face's classes whose head is new for every task
_TASKS = re.compile("Classification|QuestionAnswering|MultipleChoice")
_LINEAR = (nn.Linear, nn.MultiheadAttention)
_BY_NAME = (*_LINEAR, nn.Conv2d)
# the experts of a mixture are most of the model, position tables are not
_WORTH_SAYING = 0.25


def classifier_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The classification head of a model of Hugging Face, timm or torchvision; empty for other models.

    Hugging Face's is all that stands beside the pretrained base model (a ``pre_classifier``, too), timm's the
    last layer, torchvision's too where it is linear: its detectors have none under a usual name.
    """
    kinds = [kind for kind in type(model).__mro__ if kind is not nn.Module]
    libraries = {kind.__module__.partition(".")[0] for kind in kinds}
    base = getattr(model, getattr(model, "base_model_prefix", "") or "_", None)
    if "transformers" in libraries and any(_TASKS.search(kind.__name__) for kind in kinds):
        children = model.named_children()
        return {n: m for n, m in children if base is not None and m is not base and [*m.parameters()]}
    try:
        name, head = find_head(model)
    except ValueError:
        return {}
    known = "timm" in libraries or ("torchvision" in libraries and isinstance(head, nn.Linear))
    return {name: head} if known else {}


def all_linear(
    model: nn.Module, names: Mapping[str, nn.Module], inner: Collection[str]
) -> tuple[set[str], dict[str, nn.Module]]:
    """Names of the linear layers and attentions to adapt, and the head, which is left to be trained whole.

    Args:
        model: The model itself.
        names: All modules of the model by name.
        inner: Names of layers that belong to an attention.
    """
    # like PEFT, leave a language model's output embedding alone: it is often tied to the input's
    embedding = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        name
        for name, module in names.items()
        if isinstance(module, _LINEAR) and name not in inner and module is not embedding
    }
    heads = classifier_heads(model) if embedding is None else {}
    body = {name for name in linear if not any(name == head or name.startswith(f"{head}.") for head in heads)}
    # where there is nothing else, LoRA at the head is what was asked for
    return (body, heads) if body else (linear, {})


def unreached(model: nn.Module, reached: Collection[nn.Module], others: Collection[nn.Module]) -> str | None:
    """What holds a good part of the weights and is adapted by nobody, and how to include it, in words.

    Args:
        model: The model that the modules belong to.
        reached: Modules that are adapted.
        others: Modules that are trained whole or left out for a reason of their own.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings += [m for m in [getattr(model, "get_output_embeddings", lambda: None)()] if m is not None]
    seen = {id(p) for module in (*reached, *others, *embeddings) for p in module.parameters()}
    reached_size = sum(p.numel() for module in reached for p in module.parameters())
    sizes: Counter[type[nn.Module]] = Counter()
    names: dict[type[nn.Module], list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                sizes[type(module)] += parameter.numel()
                names.setdefault(type(module), []).append(clean_name(name))
    for kind, found in names.items():
        if len(found) < 2:
            # a patch embedding, a class token
            del sizes[kind]
    missed = sum(sizes.values())
    total = reached_size + missed
    if missed <= _WORTH_SAYING * total:
        return None
    shown = ", ".join(f"{kind.__name__} ({names[kind][0]!r} first)" for kind, _ in sizes.most_common(4))
    plain = [kind for kind in sizes if kind in _BY_NAME]
    hard = [kind.__name__ for kind in sizes if kind not in _BY_NAME]
    advice = [f"a list of target_modules can name {', '.join(kind.__name__ for kind in plain)}"] * bool(plain)
    advice += [
        f"{', '.join(hard)} can't carry LoRA here: name it in modules_to_save to train it whole, or let PEFT "
        "adapt it (target_parameters, say) and speed that up with fastlora.accelerate"
    ] * bool(hard)
    share = 100 * missed / total
    return f"{share:.0f} % of the weights beside embeddings and head, in {shown}; {'; '.join(advice)}"


def tell_frozen_head(model: nn.Module) -> None:
    """Warn of a classification head that nothing trains: a new one would stay random."""
    frozen = [
        name
        for name, module in classifier_heads(model).items()
        if not any(parameter.requires_grad for parameter in module.parameters())
    ]
    if frozen:
        logger.warning(
            "the head %s stays frozen, random if it is new; modules_to_save=%r trains it",
            ", ".join(map(repr, frozen)),
            frozen,
        )
