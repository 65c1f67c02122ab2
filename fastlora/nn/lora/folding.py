"""Folding an update into a copy of its frozen weight, in float64 and some rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

# bounds what folding needs beside the new weight: 32 MiB in float64
_ELEMENTS = 2**22


def fold(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    columns: bool = False,
) -> Tensor:
    """W + scaling·left·right in a new tensor, with DoRA scaled to the trained norms.

    Args:
        weight: W ``[rows, ...]``, seen as a matrix.
        left: ``[rows, rank]``.
        right: ``[rank, everything else]``.
        scaling: Factor of the product.
        magnitude: DoRA's norm for every output feature; None scales nothing.
        columns: Whether the output features are the columns of W, as in an embedding.

    Example:
        >>> fold(torch.zeros(2, 2), torch.eye(2), torch.ones(2, 2), 0.5).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    folded = torch.empty_like(weight)
    with torch.autocast(weight.device.type, enabled=False):
        factor = None
        if magnitude is not None:
            updated = (new for _, new in _updated_rows(weight, left, right, scaling))
            factor = _dora_factor(updated, magnitude.view(-1), columns).expand(weight.shape[0], -1)
        for rows, new in _updated_rows(weight, left, right, scaling):
            if factor is not None:
                new *= factor[rows]
            folded[rows] = new.view_as(folded[rows])
    return folded


def unfold(folded: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """W of W + scaling·left·right, to rounding; not for DoRA."""
    return fold(folded, left, right, -scaling)


def _updated_rows(
    weight: Tensor, left: Tensor, right: Tensor, scaling: float
) -> Iterator[tuple[slice, Tensor]]:
    """W + scaling·left·right as ``[rows, everything else]``, some rows at a time."""
    # float64 also keeps TF32 out; Metal has none
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    right = right.to(wide)
    step = max(1, _ELEMENTS // right.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        old = weight[rows].flatten(1).to(wide)
        yield rows, torch.addmm(old, left[rows].to(wide), right, alpha=scaling)


def _dora_factor(updated: Iterator[Tensor], magnitude: Tensor, columns: bool) -> Tensor:
    """Magnitude over norm ``[rows, 1]``, or ``[1, columns]``."""
    if columns:
        squares = torch.stack([new.square().sum(dim=0) for new in updated]).sum(dim=0)
        return (magnitude.to(squares.dtype) / squares.sqrt())[None]
    norm = torch.cat([new.norm(dim=1) for new in updated])
    return (magnitude.to(norm.dtype) / norm)[:, None]
