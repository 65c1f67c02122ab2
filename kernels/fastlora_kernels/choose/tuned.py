"""Choices of LoRA calls that were measured on a GPU here: they stand in for the predicted ones.

A record belongs to one GPU and one layer shape with so many rows; a call with another number of rows takes
the nearest record within a factor of two. Records are handed in from outside; nothing is read or timed here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose import quantised
from fastlora_kernels.choose.lora import Call
from fastlora_kernels.choose.paths import PATHS, Pass, large_kernel
from fastlora_kernels.choose.pinned import PINNED
from fastlora_kernels.choose.quantised import Stored
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


_Layer = tuple[int, int, int, str, bool, str | None]
_pinned: dict[str, dict[_Layer, list[Record]]] = {}


def pin(gpu: str, records: Iterable[Record]) -> None:
    """Use these records for calls on a GPU, by its name, from now on, and no others."""
    _pinned[gpu] = {}
    for record in records:
        # unaligned calls have tiles of their own, too many to tell apart
        if record.shape.aligned:
            layer = _layer(record.shape, record.dtype, record.dropping, record.weight)
            _pinned[gpu].setdefault(layer, []).append(record)
    PINNED.changes += 1
    PINNED.tell_hosts_apart = any(record.from_host for name in _pinned for record in pinned(name))


def pinned(gpu: str) -> list[Record]:
    """The records in use for a GPU."""
    return [record for records in _pinned.get(gpu, {}).values() for record in records]


def gpus() -> list[str]:
    """Names of the GPUs that records were handed in for."""
    return list(_pinned)


def find(
    gpu: str, shape: Shape, dtype: torch.dtype, *, dropping: bool, weight: str | None = None
) -> Record | None:
    """The record for a call on a GPU, by its name, if one is near enough and its weight is stored alike."""
    if gpu not in _pinned or not shape.aligned:
        return None
    records = _pinned[gpu].get(_layer(shape, str(dtype).removeprefix("torch."), dropping, weight), ())
    nearest = min(records, key=lambda record: _apart(record.shape.m, shape.m), default=None)
    return nearest if nearest is not None and _apart(nearest.shape.m, shape.m) <= _FARTHEST else None


def fits(record: Record, target: Target) -> bool:
    """Whether a GPU's plans still offer what a record chose: tables of tiles change."""
    call = Call(record.shape, getattr(torch, record.dtype), target, record.dropping)
    return all(
        _offered(won, call, record.weight) for won in (record.in_graph, record.from_host) if won is not None
    )


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


def _layer(shape: Shape, dtype: str, dropping: bool, weight: str | None) -> _Layer:
    return shape.n, shape.k, shape.r, dtype, dropping, weight


def _apart(one: int, other: int) -> float:
    low, high = sorted((one, other))
    return high / low if low else float("inf")
