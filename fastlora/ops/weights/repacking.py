"""Keeps bitsandbytes from rewriting 4-bit weights for inference in a model that is trained.

On a CPU with AVX512-BF16 the first ``Linear4bit.forward`` of an evaluation pass puts a copy in another order,
with statistics rounded to bfloat16, in the weight's place. From then on the layer gives its input a gradient
of zeros, and nothing says so.
"""

import sys
from typing import Any

from torch import nn

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


def let_rewrite(model: nn.Module) -> None:
    """Undo :func:`keep_as_stored`."""
    for module in model.modules():
        if _SWITCH in vars(module):
            setattr(module, _SWITCH, sys.modules["bitsandbytes"].functional.has_avx512bf16())


def _is_rewritten(layer: Any) -> bool:
    state = getattr(layer._parameters.get("weight"), "quant_state", None) or layer.quant_state
    return bool(getattr(state, "packing_format_for_cpu", False))
