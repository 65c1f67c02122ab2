"""What a Hugging Face model says of its quantised weights once some are merged into dense copies.

``from_pretrained`` makes quantised layers of all that the config doesn't except; dense ones don't fit those.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastlora._core.checks import FLOATING_DTYPES
from fastlora._core.log import logger
from fastlora.anatomy.names import clean_name
from fastlora.nn import LoRAModule
from fastlora.nn.lora.stored import is_dense

# what transformers' quantisers set on a model beside its config's quantization_config
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)
# the settings of theirs that name dense layers: bitsandbytes', the others'
_EXCEPTIONS = ("llm_int8_skip_modules", "modules_to_not_convert")


@contextlib.contextmanager
def merged_config(model: nn.Module) -> Iterator[None]:
    """Let a model say meanwhile which of its weights are quantised, beside copies that are not.

    Args:
        model: It may have no config, or one without ``quantization_config``.

    Raises:
        ValueError: Some weights are dense and some not, and the quantiser has no setting for that.
    """
    config: Any = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    marks = {name: vars(model)[name] for name in _MARKS if name in vars(model)}
    why = _except_copies(model)
    if why is not None:
        raise ValueError(why)
    try:
        yield
    finally:
        if settings is not None:
            config.quantization_config = settings
            vars(model).update(marks)


def forget_merged(model: nn.Module) -> None:
    """Let a model say for good which of its weights are quantised, or warn that it can't.

    Args:
        model: It may have no config, or one without ``quantization_config``.
    """
    why = _except_copies(model)
    if why is not None:
        logger.warning("%s", why)


def _except_copies(model: nn.Module) -> str | None:
    """Except dense copies from a model's quantisation, forgotten where nothing else is left; or why not."""
    config: Any = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    copies = any(isinstance(module, LoRAModule) and module._copied for module in model.modules())
    if settings is None or not copies:
        return None
    if not any(_is_quantised(module) for module in model.modules()):
        del config.quantization_config
        for name in _MARKS:
            vars(model).pop(name, None)
        return None
    setting = next((name for name in _EXCEPTIONS if hasattr(settings, name)), None)
    if setting is None:
        return (
            f"expected all quantised weights merged, got some that are not, and {type(settings).__name__} "
            "can't except the others: from_pretrained reads no folder with both; merge all of them, or call "
            "fastlora.unmerge_adapters(model) and fastlora.save_adapter(model, folder)"
        )
    config.quantization_config = copy.copy(settings)
    dense = {
        clean_name(name).removesuffix(".original_layer").removesuffix(".original_module")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_dense(module)
    }
    setattr(config.quantization_config, setting, sorted({*(getattr(settings, setting) or ()), *dense}))
    return None


def _is_quantised(module: nn.Module) -> bool:
    """Whether a module holds a Parameter that is no values, a linear layer's or another's."""
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    return any(type(each) is not nn.Parameter or each.dtype not in FLOATING_DTYPES for each in held)
