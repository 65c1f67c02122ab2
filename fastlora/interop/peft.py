"""PEFT models on the fused op, in place and reversibly."""

from collections import Counter
from typing import Any, TypeVar

from torch import nn

from fastlora._core.extras import require
from fastlora._core.log import logger

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Let a PEFT model's LoRA linear layers run on the fused op, in place.

    Layers, parameters and their names stay PEFT's own, so saving, switching, merging, disabling and deleting
    adapters, ``modules_to_save``, optimisers and trainers see nothing new; adapters that are added later run
    fused too. Float32 adapters beside 16-bit weights are rounded to these for the products, as autocast does.
    Of dropout the masks are others than PEFT's for the same seed.

    Served are LoRA, rsLoRA, DoRA and ``lora_bias`` on ``nn.Linear``; other layers (a quantised base, a
    convolution, other variants, hooks or other classes inside) stay PEFT's and are told by one warning on the
    logger ``fastlora``. What changes afterwards counts from the next call on: a call of which the fused op
    would pass something over is PEFT's own. Calling this again counts the layers again.

    Args:
        model: With PEFT's LoRA layers anywhere inside.

    Returns:
        The same model.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: There are no LoRA layers of PEFT in it.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 2)), LoraConfig(target_modules=["0"]))
        >>> type(accelerate(model).base_model.model[0]).__name__
        'FusedLinear'
    """
    linear = _layers()
    layers = _peft_layers(model)
    if not layers:
        raise ValueError(
            f"expected a model with LoRA layers of PEFT, got {type(model).__name__} without any; make one "
            "with peft.get_peft_model(model, LoraConfig(...)), or take fastlora.apply_lora"
        )
    left: Counter[str] = Counter()
    for layer in layers:
        reason = linear.why_not(layer)
        if reason is not None:
            left[reason] += 1
            linear.unfuse(layer)
        elif type(layer) is linear.Linear:
            layer.__class__ = linear.FusedLinear
    if left:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(left.items()))
        logger.warning("%d of %d LoRA layers run fused; left to PEFT: %s", _fused(layers), len(layers), told)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, in place; layers that were sharded or parametrized since stay so.

    Raises:
        ImportError: PEFT is not installed.

    Returns:
        The same model.
    """
    linear = _layers()
    for layer in _peft_layers(model):
        linear.unfuse(layer)
    return model


def _layers() -> Any:
    require("peft", distribution="peft", purpose="accelerating a PEFT model", extra="peft")
    from fastlora.interop import _peft_linear

    return _peft_linear


def _peft_layers(model: nn.Module) -> list[Any]:
    kind = _layers().PeftLayer
    return [module for module in model.modules() if isinstance(module, kind)]


def _fused(layers: list[Any]) -> int:
    kind = _layers().FusedLinear
    return sum(isinstance(layer, kind) for layer in layers)
