"""Kernels that a CUDA graph will launch, loaded before it is made: while it is, nothing can be loaded.

``fastlora tune`` may have found other winners for CUDA graphs than for calls from Python, which are all that
runs before a graph is made.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops.decide import Decision
from fastlora.ops.lora_passes import lora_linear_backward, lora_linear_forward
from fastlora.ops.weights import in_parts
from fastlora.ops.weights.frozen import FrozenWeight


@torch.no_grad()
def load(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float,
    training: bool,
    decision: Decision,
) -> None:
    """Run a LoRA call once in each way that a graph may, and drop the results.

    Args:
        x: ``[..., in_features]``, in the dtype of the products.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``, or None.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        scaling: Factor of the low-rank path.
        dropout: Probability; 0 where it is not active.
        training: Whether backward passes follow.
        decision: What was decided for a graph.
    """
    quantised = isinstance(weight, FrozenWeight)
    forward: Any = in_parts.forward if quantised else lora_linear_forward
    backward: Any = in_parts.backward if quantised else lora_linear_backward
    # not drawn: torch's generator stays as it is
    seed = torch.zeros(1, dtype=torch.int64, device=x.device) if dropout else None
    y, s, mask = forward(x, weight, bias, lora_A, lora_B, seed, scaling, dropout, decision)
    # a model's first layer has no use for dX
    for need_x in (True, False) if training else ():
        kept = (y, x, weight, lora_A, lora_B, s, mask)
        backward(*kept, scaling, dropout, need_x, True, True, decision)
