"""Choices of LoRA calls that were measured on this GPU: they stand in for the predicted ones.

A record belongs to one layer shape with so many rows; a call with another number of rows takes the nearest
record within a factor of two. Records are handed in by ``fastlora.tuning``; nothing is read or timed here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fastlora_kernels.plan import Shape, Tile

REFERENCE = "reference"
_FARTHEST = 2.0


@dataclass(frozen=True)
class Choice:
    """What won for one pass.

    Attributes:
        path: One of the kernels' paths, or ``reference`` where the eager formula won forward and backward.
        tile: Of the large product, where the path has one of ours.
    """

    path: str
    tile: Tile | None = None


@dataclass(frozen=True)
class Record:
    """What was measured for one layer call.

    Attributes:
        shape: Of the call.
        dtype: Of x: ``bfloat16``, ``float16`` or ``float32``.
        dropping: Whether dropout was active.
        forward: What won forward.
        backward: What won backward.
        microseconds: Median of every candidate by pass and name, the winners' included.
    """

    shape: Shape
    dtype: str
    dropping: bool
    forward: Choice
    backward: Choice
    microseconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)


_Layer = tuple[int, int, int, str, bool]
_pinned: dict[_Layer, list[Record]] = {}


def pin(records: Iterable[Record]) -> None:
    """Use these records from now on, and no others."""
    _pinned.clear()
    for record in records:
        # unaligned calls have tiles of their own, too many to tell apart
        if record.shape.aligned:
            _pinned.setdefault(_layer(record.shape, record.dtype, record.dropping), []).append(record)


def pinned() -> list[Record]:
    """The records in use."""
    return [record for records in _pinned.values() for record in records]


def find(shape: Shape, dtype: torch.dtype, *, dropping: bool) -> Record | None:
    """The record for a call, if one is near enough."""
    if not _pinned or not shape.aligned:
        return None
    records = _pinned.get(_layer(shape, str(dtype).removeprefix("torch."), dropping), ())
    nearest = min(records, key=lambda record: _apart(record.shape.m, shape.m), default=None)
    return nearest if nearest is not None and _apart(nearest.shape.m, shape.m) <= _FARTHEST else None


def _layer(shape: Shape, dtype: str, dropping: bool) -> _Layer:
    return shape.n, shape.k, shape.r, dtype, dropping


def _apart(one: int, other: int) -> float:
    low, high = sorted((one, other))
    return high / low if low else float("inf")
