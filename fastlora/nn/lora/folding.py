"""Folding an update into a copy of its frozen weight, in float64 and some rows at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastlora.nn.lora.base import LoRAModule

# bounds what folding needs beside the new weight: 32 MiB in float64
_ELEMENTS = 2**22


def fold(layer: "LoRAModule", weight: Tensor) -> Tensor:
    """W + scaling·B·A in a new tensor, with DoRA scaled to the trained norms."""
    folded = torch.empty_like(weight)
    with torch.autocast(weight.device.type, enabled=False):
        factor = _dora_factor(layer, weight).expand(weight.shape[0], -1) if layer.dora else None
        for rows, new in _updated_rows(layer, weight):
            if factor is not None:
                new *= factor[rows]
            folded[rows] = new.view_as(folded[rows])
    return folded


def unfold(layer: "LoRAModule", folded: Tensor) -> Tensor:
    """W of W + scaling·B·A, to rounding; not for DoRA."""
    weight = torch.empty_like(folded)
    with torch.autocast(folded.device.type, enabled=False):
        for rows, new in _updated_rows(layer, folded, sign=-1.0):
            weight[rows] = new.view_as(weight[rows])
    return weight


def _updated_rows(layer: "LoRAModule", weight: Tensor, sign: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
    """W + sign·scaling·B·A as ``[rows, everything else]``."""
    # float64 also keeps TF32 out; Metal has none
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    left, right = layer._factors()
    right = right.to(wide)
    step = max(1, _ELEMENTS // right.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        old = weight[rows].flatten(1).to(wide)
        yield rows, torch.addmm(old, left[rows].to(wide), right, alpha=sign * layer.scaling)


def _dora_factor(layer: "LoRAModule", weight: Tensor) -> Tensor:
    """Magnitude over norm ``[rows, 1]``; for an embedding, whose outputs are columns, ``[1, columns]``."""
    magnitude = layer.lora_magnitude_vector.view(-1)
    if layer._is_embedding:
        squares = torch.stack([new.square().sum(dim=0) for _, new in _updated_rows(layer, weight)]).sum(dim=0)
        return (magnitude.to(squares.dtype) / squares.sqrt())[None]
    norm = torch.cat([new.norm(dim=1) for _, new in _updated_rows(layer, weight)])
    return (magnitude.to(norm.dtype) / norm)[:, None]
