"""DoRA's norm, computed again only where something it comes from has changed."""

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.functional import dora_weight_norm


class NormCache:
    """‖W + s·B·A‖ of one layer, for every output feature; in eval mode it is kept until anything changes.

    What changes a tensor behind autograd's back (``parameter.data.copy_``) goes unnoticed until the layer's
    next ``train()`` or ``eval()``, which clear the cache.
    """

    def __init__(self) -> None:
        """Empty."""
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def clear(self) -> None:
        """Forget the norm."""
        self._kept = None

    def norm(
        self,
        sources: tuple[Tensor, Tensor, Tensor],
        rows: tuple[Tensor, Tensor, Tensor],
        scaling: float,
        *,
        training: bool,
    ) -> Tensor:
        """The norm ``[out]``, a constant to autograd.

        Args:
            sources: The layer's own weight, A and B, by which changes are noticed.
            rows: Weight, A and B as matrices ``[out, …]``, ``[rank, …]`` and ``[out, rank]``.
            scaling: s.
            training: Whether A and B are about to change, so that the norm is not kept.
        """
        # nothing is kept or forgotten while tracing: under checkpointing that would be a side effect
        if torch.compiler.is_compiling():
            return dora_weight_norm(*rows, scaling)
        if training or not all(map(_counts_changes, sources)):
            self._kept = None
            return dora_weight_norm(*rows, scaling)
        # the tensors themselves, so that none that takes a freed one's place is mistaken for it
        key = (scaling, *(part for t in sources for part in (t, t._version, t.data_ptr())))
        if self._kept is None or not _same(self._kept[0], key):
            self._kept = key, dora_weight_norm(*rows, scaling)
        return self._kept[1]


def _counts_changes(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and not (tensor.is_meta or tensor.is_inference())


def _same(kept: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    # tensors by identity: they compare element by element
    return all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(kept, now, strict=True))
