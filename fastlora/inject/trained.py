"""What trains in an adapted model, and what must be switched off so that adapters are not skipped."""

from collections.abc import Collection

from torch import nn

from fastlora._core.log import logger
from fastlora.anatomy.names import Added, holds_tuner, tuner_parameters
from fastlora.anatomy.tied import all_holders, is_inside, without_parents
from fastlora.inject.pretrained import forget_saving, save_training_too
from fastlora.inject.summary import adapter_summary
from fastlora.ops.weights.repacking import let_rewrite

# torch's transformer encoder has a fused inference path that reads weights and calls no layer: adapters would
# be silently ignored under eval() and no_grad(). class → the attribute that allows it, and its "off"
_FAST_PATHS: dict[type[nn.Module], tuple[str, int | bool]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_REMEMBERED = "_fastlora_fast_path"
# on a model whose trainable parameters we have chosen: a second kind of adapter then spares them
_CHOSEN = "_fastlora_chosen"


def train_only_tuners(model: nn.Module, whole: Collection[nn.Module]) -> None:
    """Freeze all but what fastlora added and the ``whole`` modules, once the model has its new modules.

    A model that went through this before keeps training what it trained, a classification head, say.
    """
    spared = tuner_parameters(model)
    if _CHOSEN in vars(model):
        spared += [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in whole:
        spared += [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    model.requires_grad_(False)
    for parameter in spared:
        parameter.requires_grad_(True)
    setattr(model, _CHOSEN, True)
    _disable_fast_paths(model)
    save_training_too(model)
    logger.info("%s: %s", type(model).__name__, adapter_summary(model))


def forget_tuners(model: nn.Module) -> None:
    """Undo what :func:`train_only_tuners` left beside frozen parameters, where no tuner is left."""
    forget_saving(model)
    if not holds_tuner(model):
        let_rewrite(model)
    if _CHOSEN in vars(model) and not holds_tuner(model):
        delattr(model, _CHOSEN)
    for module in model.modules():
        for kind, (attribute, _) in _FAST_PATHS.items():
            if isinstance(module, kind) and _REMEMBERED in vars(module) and not holds_tuner(module):
                setattr(module, attribute, getattr(module, _REMEMBERED))
                delattr(module, _REMEMBERED)


def trained_whole(model: nn.Module, here: Added) -> list[str]:
    """Names of the modules that own trainable parameters that are not filed under a kind of adapter.

    Of a shared parameter these are all of its owners: a reader may train them apart.

    Args:
        model: An adapted model.
        here: What was added to it.

    Raises:
        ValueError: One of them contains an adapter.
    """
    adapters = (place.adapter for place in here.places.values())
    tuners = [*here.layers.values(), *adapters, *here.prompts.values()]
    ours = {id(parameter) for tuner in tuners for parameter in tuner_parameters(tuner)}
    owners = {
        holder.owner: holder.key
        for holders in all_holders(model)
        if holders[0].parameter.requires_grad and id(holders[0].parameter) not in ours
        for holder in without_parents(holders)
    }
    # the module at an adapter's own place has a state dict without the adapter
    inside = [*(f"{name}." for name in here.layers), *here.places, *here.prompts]
    for owner, parameter_name in owners.items():
        if any(name.startswith(f"{owner}." if owner else "") for name in inside):
            raise ValueError(
                "expected trainable parameters in modules without LoRA layers, adapters or prompts, got "
                f"{parameter_name!r}; PEFT's format saves whole modules only, so does ours: freeze it, or "
                "move it into a module of its own"
            )
    return [owner for owner in owners if not any(is_inside(owner, other) for other in owners)]


def _disable_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for kind, (attribute, off) in _FAST_PATHS.items():
            # a second kind of adapter must not remember the first one's "off"
            fresh = isinstance(module, kind) and _REMEMBERED not in vars(module)
            if fresh and holds_tuner(module):
                setattr(module, _REMEMBERED, getattr(module, attribute))
                setattr(module, attribute, off)
