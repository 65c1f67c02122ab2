"""Fold LoRA into the weights and out again."""

from collections.abc import Iterable

from torch import nn

from fastlora._core.log import logger
from fastlora.anatomy.names import Model, lora_layers, require_lora_layers, unwrap
from fastlora.inject.pretrained import moved_apart
from fastlora.nn import LoRAModule


def merge_adapters(model: Model, *, requantise: bool = False) -> Model:
    """Fold every update into its weight, reversibly: inference then costs what it did without LoRA.

    While merged, ``state_dict()`` is the plain model's, which the plain model loads; an adapted one starts
    its updates afresh when it loads it. Tied weights that an update moves apart are logged as a warning.
    A quantised weight is merged into a dense copy, in the dtype that it was quantised from if that is known,
    which is logged with its size; quantised again, it would lose a good part of a small update.

    Args:
        model: An adapted model, changed in place.
        requantise: Quantise bitsandbytes' merged weights again, and log what that costs: the relative error
            of each is its layer's ``requantisation_error``.

    Returns:
        The same model. Call :func:`unmerge_adapters` before training on.

    Raises:
        ValueError: The model has no LoRA layers, or some that can't be folded in (convolutions with groups)
            or quantised again; nothing is changed then. Bottleneck adapters can't be folded into anything,
            and stay.

    Example:
        >>> from torch import nn
        >>> from fastlora import apply_lora
        >>> model = merge_adapters(apply_lora(nn.Sequential(nn.Linear(4, 2)), rank=1))
        >>> model[0].merged
        True
    """
    layers = require_lora_layers(model)
    for name, layer in layers.items():
        try:
            layer.check_mergeable(requantise=requantise)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for layer in layers.values():
        layer.merge(requantise=requantise)
    _tell_quantised(layers.values())
    _warn_of_untied(model)
    return model


def unmerge_adapters(model: Model) -> Model:
    """Put every original weight back, bit for bit.

    Args:
        model: An adapted model, changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no LoRA layers.

    Example:
        >>> from torch import nn
        >>> from fastlora import apply_lora
        >>> model = merge_adapters(apply_lora(nn.Sequential(nn.Linear(4, 2)), rank=1))
        >>> unmerge_adapters(model)[0].merged
        False
    """
    for layer in require_lora_layers(model).values():
        layer.unmerge()
    return model


def merged_apart(model: nn.Module) -> dict[str, list[str]]:
    """Merged layers whose frozen weight other modules hold too, and these.

    Args:
        model: An adapted model.
    """
    return {name: others for name, others in moved_apart(model).items() if lora_layers(model)[name].merged}


def _tell_quantised(layers: Iterable[LoRAModule]) -> None:
    copies = [layer._weight() for layer in layers if layer._copied]
    if copies:
        size = sum(copy.numel() * copy.itemsize for copy in copies) / 2**20
        logger.warning(
            "%d quantised weights were merged into %s copies of %.1f MiB; unmerge_adapters puts the "
            "quantised ones back, requantise=True quantises the merged ones",
            len(copies),
            " and ".join(sorted({str(copy.dtype).removeprefix("torch.") for copy in copies})),
            size,
        )
    errors = [layer.requantisation_error for layer in layers if layer.requantisation_error is not None]
    if errors:
        logger.warning(
            "%d merged weights were quantised again: relative error %.2g on average, %.2g at most",
            len(errors),
            sum(errors) / len(errors),
            max(errors),
        )


def _warn_of_untied(model: nn.Module) -> None:
    apart = merged_apart(unwrap(model))
    if apart:
        name, others = next(iter(apart.items()))
        logger.warning(
            "%s shares its frozen weight with %s, which has not its update: merged they differ, and a model "
            "that ties them can't load both (save_pretrained writes tie_word_embeddings=False)",
            name,
            ", ".join(others),
        )
