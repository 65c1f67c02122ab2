"""Choices of LoRA calls that were measured on a GPU here: they stand in for the predicted ones.

A record belongs to one GPU and one layer shape, or those of layers that share their input, with so many rows;
a call with another number of rows takes the nearest record within a factor of two. Records are handed in from
outside; nothing is read or timed here.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose import quantised
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.paths import PATHS, Pass, large_kernel
from fastlora_kernels.choose.pinned import PINNED
from fastlora_kernels.choose.quantised import Stored
from fastlora_kernels.choose.shared import shared_candidates, shared_tiles
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, Tile

REFERENCE = "reference"
_FARTHEST = 2.0


@dataclass(frozen=True)
class Choice:
    """What won for one pass.

    Attributes:
        path: One of the kernels' paths, or ``reference`` where the eager formula won forward and backward.
        tile: Tile of the large product, where that is a kernel of ours; else None.
    """

    path: str
    tile: Tile | None = None


Microseconds = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Winners:
    """What won a call's two passes.

    Attributes:
        forward: What won forward.
        backward: What won backward.
        microseconds: Median of every candidate by pass and name, the winners' included; by ``step`` those of
            both passes, ``eager`` and ``fused``, as far as they could run.
    """

    forward: Choice
    backward: Choice
    microseconds: Microseconds = field(default_factory=dict, hash=False)

    def forward_but(self, path: str) -> Choice | None:
        """The fastest forward path but one, with the tile that is planned for it; None: no other was timed.

        Args:
            path: Name of the path that can't serve the call.
        """
        timed = self.microseconds.get("forward", {})
        # a candidate's name begins with its path
        others = {name: name.split()[0] for name in timed}
        left = [name for name, other in others.items() if other in PATHS and other != path]
        return Choice(others[min(left, key=lambda name: timed[name])]) if left else None


@dataclass(frozen=True)
class Record:
    """What was measured for one layer call.

    Attributes:
        shape: Sizes of the call.
        dtype: The dtype of x: ``bfloat16``, ``float16`` or ``float32``.
        dropping: Whether dropout was active.
        forward: What won forward as a CUDA graph, where the host's time does not count.
        backward: What won backward as a CUDA graph.
        microseconds: Median of every candidate as a CUDA graph by pass and name, the winners' included.
        from_host: What won where the host launches every kernel, as in eager mode; None where that was not
            measured.
        weight: How the frozen weight is stored: ``nf4``, ``int8``, ``fp8`` or ``fp8-rows``; None: dense.
    """

    shape: Shape
    dtype: str
    dropping: bool
    forward: Choice
    backward: Choice
    microseconds: Microseconds = field(default_factory=dict, hash=False)
    from_host: Winners | None = None
    weight: Stored | None = None

    @property
    def in_graph(self) -> Winners:
        """What won as a CUDA graph."""
        return Winners(self.forward, self.backward, self.microseconds)


@dataclass(frozen=True)
class SharedRecord:
    """What was measured for the backward pass of layers that share their input.

    Attributes:
        shapes: Sizes of each layer's call.
        dtype: The dtype of x: ``bfloat16``, ``float16`` or ``float32``.
        dropping: Whether dropout was active, in each of them.
        in_graph: What won as a CUDA graph, where the host's time does not count.
        from_host: What won where the host launches every kernel, as in eager mode.
        microseconds: Medians of every candidate by name, under ``graph`` and ``host``.
    """

    shapes: tuple[Shape, ...]
    dtype: str
    dropping: bool
    in_graph: Choice
    from_host: Choice
    microseconds: Microseconds = field(default_factory=dict, hash=False)


AnyRecord = Record | SharedRecord
# by all of a call but its rows
_pinned: dict[str, dict[Hashable, list[Any]]] = {}


def pin(gpu: str, records: Iterable[AnyRecord]) -> None:
    """Use these records for calls on a GPU, by its name, from now on, and no others."""
    _pinned[gpu] = {}
    for record in records:
        # unaligned calls have tiles of their own, too many to tell apart
        if all(shape.aligned for shape in _shapes(record)):
            weight = record.weight if isinstance(record, Record) else None
            key = _key(_shapes(record), record.dtype, record.dropping, weight)
            _pinned[gpu].setdefault(key, []).append(record)
    PINNED.changes += 1
    PINNED.tell_hosts_apart = any(record.from_host for name in _pinned for record in pinned(name))


def pinned(gpu: str) -> list[AnyRecord]:
    """The records in use for a GPU."""
    return [record for records in _pinned.get(gpu, {}).values() for record in records]


def gpus() -> list[str]:
    """Names of the GPUs that records were handed in for."""
    return list(_pinned)


def find(
    gpu: str, shape: Shape, dtype: torch.dtype, *, dropping: bool, weight: str | None = None
) -> Record | None:
    """The record for a call on a GPU, by its name, if one is near enough and its weight is stored alike."""
    found: Record | None = _nearest(gpu, (shape,), dtype, dropping, weight)
    return found


def find_shared(
    gpu: str, shapes: Sequence[Shape], dtype: torch.dtype, *, dropping: bool
) -> SharedRecord | None:
    """The record for layers that share their input, in this order, if one is near enough.

    Args:
        gpu: Name of the GPU.
        shapes: Sizes of each layer's call, two at least.
        dtype: The dtype of x.
        dropping: Whether dropout is active, in each of them.
    """
    found: SharedRecord | None = _nearest(gpu, shapes, dtype, dropping, None)
    return found


def fits(record: AnyRecord, target: Target) -> bool:
    """Whether a GPU's plans still offer what a record chose: tables of tiles change."""
    dtype = getattr(torch, record.dtype)
    if isinstance(record, SharedRecord):
        offered = shared_choices(record.shapes, dtype, target, dropping=record.dropping)
        return len(record.shapes) > 1 and record.in_graph in offered and record.from_host in offered
    call = Call(record.shape, dtype, target, record.dropping)
    return all(
        _offered(won, call, record.weight) for won in (record.in_graph, record.from_host) if won is not None
    )


def shared_choices(
    shapes: Sequence[Shape], dtype: torch.dtype, target: Target, *, dropping: bool
) -> list[Choice]:
    """Every path that can serve the backward pass of layers that share their input, with every tile.

    Args:
        shapes: Sizes of each layer's call, the same rows and inputs in all.
        dtype: The dtype of x.
        target: The GPU.
        dropping: Whether dropout is active, in each of them.
    """
    found = shared_candidates([Call(shape, dtype, target, dropping) for shape in shapes])
    return [
        Choice(each.path, tile)
        for each in found
        if not each.refused
        for tile in (shared_tiles(shapes, dtype, target) if each.path == "shared" else (None,))
    ]


def _offered(won: Winners, call: Call, weight: Stored | None) -> bool:
    choices: dict[Pass, Choice] = {"forward": won.forward, "backward": won.backward}
    if {choice.path for choice in choices.values()} == {REFERENCE}:
        return True
    for part, choice in choices.items():
        offered = [each.path for each in quantised.of_weight(part, call, weight) if not each.refused]
        kernel = large_kernel(part, choice.path, weight)
        tiles = () if kernel is None else tuple(plans.tiles(kernel, call.shape.r, call.dtype, call.target))
        if choice.path not in offered or not (choice.tile is None or choice.tile in tiles):
            return False
    return True


def _shapes(record: AnyRecord) -> Sequence[Shape]:
    return record.shapes if isinstance(record, SharedRecord) else (record.shape,)


def _key(shapes: Sequence[Shape], dtype: str, dropping: bool, weight: str | None) -> Hashable:
    return tuple([(shape.n, shape.k, shape.r) for shape in shapes]), dtype, dropping, weight


def _nearest(
    gpu: str, shapes: Sequence[Shape], dtype: torch.dtype, dropping: bool, weight: str | None
) -> Any:
    """The record of the nearest number of rows, if it is near enough."""
    if gpu not in _pinned or not all(shape.aligned for shape in shapes):
        return None
    key = _key(shapes, str(dtype).removeprefix("torch."), dropping, weight)

    def apart(record: AnyRecord) -> float:
        return _apart(_shapes(record)[0].m, shapes[0].m)

    nearest = min(_pinned[gpu].get(key, ()), key=apart, default=None)
    return nearest if nearest is not None and apart(nearest) <= _FARTHEST else None


def _apart(one: int, other: int) -> float:
    low, high = sorted((one, other))
    return high / low if low else float("inf")
