"""What trains in an adapted model, and what must be switched off so that adapters are not skipped."""

from collections.abc import Collection

from torch import nn

from fastlora._core.log import logger
from fastlora.anatomy.names import holds_tuner, tuner_parameters
from fastlora.inject.pretrained import forget_saving, save_training_too
from fastlora.inject.summary import adapter_summary

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
    if _CHOSEN in vars(model) and not holds_tuner(model):
        delattr(model, _CHOSEN)
    for module in model.modules():
        for kind, (attribute, _) in _FAST_PATHS.items():
            if isinstance(module, kind) and _REMEMBERED in vars(module) and not holds_tuner(module):
                setattr(module, attribute, getattr(module, _REMEMBERED))
                delattr(module, _REMEMBERED)


def _disable_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for kind, (attribute, off) in _FAST_PATHS.items():
            # a second kind of adapter must not remember the first one's "off"
            fresh = isinstance(module, kind) and _REMEMBERED not in vars(module)
            if fresh and holds_tuner(module):
                setattr(module, _REMEMBERED, getattr(module, attribute))
                setattr(module, attribute, off)
