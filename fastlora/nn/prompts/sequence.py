"""Putting prompts into a sequence, and taking their positions out of whatever a model returns."""

from typing import Any

import torch
from torch import Tensor


def insert_after(x: Tensor, new: Tensor, position: int) -> Tensor:
    """``new`` ``[batch, tokens, ...]`` behind the first ``position`` entries of dimension 1 of ``x``."""
    return torch.cat([x[:, :position], new, x[:, position:]], dim=1)


def strip_after(x: Tensor, tokens: int, position: int) -> Tensor:
    """The inverse of :func:`insert_after`."""
    return torch.cat([x[:, :position], x[:, position + tokens :]], dim=1)


def strip_output(output: Any, tokens: int, position: int, length: int) -> Any:
    """Take the prompts out of every hidden state ``[batch, length, hidden]`` in a model's output.

    Args:
        output: A tensor, a tuple, or one of Hugging Face's ordered dictionaries, which is changed in place.
        tokens: How many prompts there are.
        position: How many entries stand before them.
        length: The sequence length with prompts. Other lengths, and attention maps, stay as they are.
    """
    if isinstance(output, Tensor):
        prompted = output.dim() == 3 and output.shape[1] == length
        return strip_after(output, tokens, position) if prompted else output
    if isinstance(output, dict):
        for key in list(output):
            output[key] = strip_output(output[key], tokens, position, length)
        return output
    if type(output) in (tuple, list):
        return type(output)(strip_output(part, tokens, position, length) for part in output)
    return output


def behind_padding(mask: Tensor | None) -> Tensor | None:
    """Positions from each row's first token on: padding before it must not part it from the prompts."""
    if mask is None:
        return None
    padding = (mask.long().cumsum(1) == 0).sum(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - padding).clamp(min=0)
