"""Modules that train whole beside adapters, a new classification head, say."""

from torch import nn

from fastlora.anatomy.names import Added, tuner_parameters
from fastlora.anatomy.tied import all_holders, is_inside, without_parents


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
