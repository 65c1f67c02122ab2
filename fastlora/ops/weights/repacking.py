"""Keeps bitsandbytes from rewriting 4-bit weights for inference in a model that is trained.

On a CPU with AVX512-BF16 the first ``Linear4bit.forward`` of an evaluation pass puts a copy in another order,
with statistics rounded to bfloat16, in the weight's place. From then on the layer gives its input a gradient
of zeros, and nothing says so.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

# its instances look here whether the CPU can
_SWITCH = "support_avx512bf16_for_cpu"


def keep_as_stored(model: nn.Module) -> None:
    """Switch this off in every 4-bit layer of a model.

    Raises:
        ValueError: It has happened to a layer already; nothing is changed then.
    """
    layers = {name: module for name, module in model.named_modules() if _SWITCH in vars(module)}
    rewritten = [name for name, layer in layers.items() if _is_rewritten(layer)]
    if rewritten:
        raise ValueError(
            f"expected 4-bit weights as they were loaded, got {len(rewritten)} of {len(layers)} that "
            f"bitsandbytes rewrote for inference in an evaluation pass, {rewritten[0] or 'the layer'} first: "
            "they give no gradient; load the model again, and call this before it is evaluated"
        )
    for layer in layers.values():
        setattr(layer, _SWITCH, False)


def refuse_changed(layer: Any, x: Tensor) -> None:
    """Refuse to call a 4-bit layer that would not say that it computes something else.

    Args:
        layer: Any layer.
        x: What it is called with.

    Raises:
        RuntimeError: Its bytes were cast as if they were floats, or it would give ``x`` a gradient of zeros.
    """
    if _SWITCH not in vars(layer):
        return
    weight = layer.weight
    if _state(layer) is None:
        # it is not quantised yet, which bitsandbytes says itself
        return
    storage = getattr(weight, "quant_storage", layer.quant_storage)
    if weight.dtype != storage:
        raise RuntimeError(
            f"expected 4-bit weights stored as {storage}, got bytes that were cast to {weight.dtype} (FSDP's "
            "MixedPrecisionPolicy does so); load the model with bnb_4bit_quant_storage=torch.uint8"
        )
    if x.requires_grad and torch.is_grad_enabled() and _is_rewritten(layer):
        raise RuntimeError(
            "expected 4-bit weights as they were loaded, got some that bitsandbytes rewrote for inference: "
            "they give no gradient; load the model again"
        )


def let_rewrite(model: nn.Module) -> None:
    """Undo :func:`keep_as_stored`."""
    for module in model.modules():
        if _SWITCH in vars(module):
            setattr(module, _SWITCH, sys.modules["bitsandbytes"].functional.has_avx512bf16())


def _is_rewritten(layer: Any) -> bool:
    return bool(getattr(_state(layer), "packing_format_for_cpu", False))


def _state(layer: Any) -> Any:
    return getattr(layer.weight, "quant_state", None) or layer.quant_state
