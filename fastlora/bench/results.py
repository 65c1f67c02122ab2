"""The results files of ``benchmarks/``: read, checked, and what follows from their numbers."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora._core.files import read_json

SCHEMA = 1
OURS, PEFT, EAGER = "fastlora", "peft", "reference"
# what nobody can beat: the layer that does not train, or the bare products
CEILINGS = ("frozen", "products")
# suites of LoRA layers on a GPU: called one after another, the host included, and as CUDA graphs
EAGER_MODE, GRAPHS = "eager", "graphs"
# not rivals: they do less
_BOUNDS = (*CEILINGS, "fastlora_compiled")
_PASSES = ("forward", "forward_backward", "step")


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        suite: ``layers``, ``eager``, ``graphs``, ``memory``, ``adapters`` or ``steps``.
        name: Name of the layer or model.
        m: Rows of the input; None for a whole model.
        k: Columns of the input; None for a whole model.
        n: Columns of the output; None for a whole model.
        rank: Rank of LoRA; the bottleneck of an adapter.
        dtype: Dtype of the frozen weights: ``fp32``, ``bf16`` or ``fp16``.
        dropout: Probability of dropout.
        threads: Threads of the CPU; None on a GPU.
        passes: ``forward``, ``forward_backward`` or ``step``.
        median_ms: Time of each candidate, in ms.
        spread_ms: Interquartile range of each candidate's times, in ms.
        kept_bytes: Bytes that each candidate keeps for backward.
        peak_bytes: The most bytes that each candidate's step holds at once.
        flops: Floating-point operations of the case's formula, or None.
        least_bytes: Memory traffic of the formula where either pass moves each tensor once, or None.
        left_out: Why a candidate was not timed.
        host_ms: What a pass of each candidate costs the host, in ms.
        predicted_ms: What the launch plan predicts for fastlora and for the frozen layer, in ms.
    """

    suite: str
    name: str
    m: int | None
    k: int | None
    n: int | None
    rank: int
    dtype: str
    dropout: float
    threads: int | None
    passes: str
    median_ms: Mapping[str, float]
    spread_ms: Mapping[str, float]
    kept_bytes: Mapping[str, int]
    peak_bytes: Mapping[str, int]
    flops: int | None
    least_bytes: int | None
    left_out: Mapping[str, str]
    host_ms: Mapping[str, float] = field(default_factory=dict)
    predicted_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Rows × columns in × columns out, or the adapter's bottleneck; empty for a model."""
        if self.m is None:
            return ""
        if self.suite == "adapters":
            return f"{self.m} × {self.k}, bottleneck {self.rank}"
        return f"{self.m} × {self.k} × {self.n}"

    @property
    def input_bytes(self) -> int | None:
        """Of the input; None for a model."""
        if self.m is None or self.k is None:
            return None
        return self.m * self.k * (4 if self.dtype == "fp32" else 2)

    @property
    def ceiling_ms(self) -> float | None:
        """Time of what nobody can beat, where it was measured."""
        return next((self.median_ms[name] for name in CEILINGS if name in self.median_ms), None)

    @property
    def intensity(self) -> float:
        """Operations per byte that has to move; 0 where neither is known."""
        return self.flops / self.least_bytes if self.flops and self.least_bytes else 0.0

    def tflops(self, candidate: str) -> float:
        """Operations of the formula in 10¹² a second that a candidate reaches."""
        return (self.flops or 0) / self.median_ms[candidate] / 1e9

    def speed_up(self, rival: str) -> float | None:
        """How many times faster fastlora is than a rival."""
        if rival not in self.median_ms or OURS not in self.median_ms:
            return None
        return self.median_ms[rival] / self.median_ms[OURS]


@dataclass(frozen=True)
class Loss:
    """A case in which something was faster than fastlora.

    Attributes:
        row: The case.
        rival: The candidate that was faster.
        factor: fastlora's time over its.
        within_spread: Whether the difference is smaller than half of the two interquartile ranges' sum.
    """

    row: Row
    rival: str
    factor: float
    within_spread: bool


@dataclass(frozen=True)
class Results:
    """A results file.

    Attributes:
        device: Name of the processor.
        kind: ``cpu`` or ``gpu``.
        environment: Versions, clocks, what ran beside.
        complete: Whether every case of the run went through.
        failed: Cases that did not, with their errors.
        rows: The cases.
        exactness: What a check of a card has compared with float64.
        checks_card: Whether ``make gpu-check`` made it, which times its suites in ways of their own.
    """

    device: str
    kind: str
    environment: Mapping[str, Any]
    complete: bool
    failed: tuple[Mapping[str, str], ...]
    rows: tuple[Row, ...]
    exactness: tuple[Mapping[str, Any], ...] = ()
    checks_card: bool = False

    @property
    def was_busy(self) -> bool:
        """Whether the machine had other work for half of its cores or more when a run on a CPU began."""
        cores, load = self.environment.get("cores"), self.environment.get("load_before")
        return self.kind == "cpu" and load is not None and cores is not None and load >= cores / 2

    @property
    def timed(self) -> list[Row]:
        """Rows with a time of ours."""
        return [row for row in self.rows if OURS in row.median_ms]

    def losses(self) -> list[Loss]:
        """Every case in which some rival is faster, the largest loss first."""
        found = [
            Loss(row, rival, row.median_ms[OURS] / median, _within_spread(row, rival))
            for row in self.timed
            for rival, median in row.median_ms.items()
            if rival not in (OURS, *_BOUNDS) and median < row.median_ms[OURS]
        ]
        return sorted(found, key=lambda loss: -loss.factor)


def _within_spread(row: Row, rival: str) -> bool:
    spread = (row.spread_ms.get(OURS, 0.0) + row.spread_ms.get(rival, 0.0)) / 2
    return row.median_ms[OURS] - row.median_ms[rival] < spread


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios.

    Example:
        >>> geometric_mean([0.5, 2.0])
        1.0
    """
    return math.exp(statistics.mean(map(math.log, values)))


def load_results(path: Path) -> Results:
    """Read a results file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, or not of this schema; the message names what was expected.
    """
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"expected a results file of `make bench` or `make bench-gpu`, got {path}, which does not exist"
        ) from error
    return _results(content, str(path))


def _results(content: Any, where: str) -> Results:
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f'expected a results file with "schema": {SCHEMA} in {where}, got {schema!r}; '
            "make it anew with `make bench` or `make bench-gpu`"
        )
    device = _get(content, "device", dict, where)
    kind = _get(device, "kind", str, f"{where}: device")
    if kind not in ("cpu", "gpu"):
        raise ValueError(f'expected "cpu" or "gpu" as kind of the device in {where}, got {kind!r}')
    rows = _get(content, "rows", list, where)
    if not rows:
        raise ValueError(f"expected at least one row in {where}, got none: no case was measured")
    return Results(
        device=_get(device, "name", str, f"{where}: device"),
        kind=kind,
        environment=_get(content, "environment", dict, where),
        complete=bool(content.get("complete", True)),
        failed=tuple(content.get("failed", ())),
        exactness=tuple(content.get("exactness", ())),
        checks_card="exactness" in content,
        rows=tuple(_row(row, f"{where}: row {number}") for number, row in enumerate(rows)),
    )


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object as {where}, got {row!r}")
    passes = _get(row, "pass", str, where)
    if passes not in _PASSES:
        raise ValueError(f"expected one of {', '.join(_PASSES)} as pass in {where}, got {passes!r}")
    return Row(
        **{name: _get(row, name, str, where) for name in ("suite", "name", "dtype")},
        **{name: _optional(row, name, where) for name in ("m", "k", "n", "threads", "flops", "least_bytes")},
        median_ms=_times(row, "median_ms", where),
        spread_ms=_times(row, "spread_ms", where),
        kept_bytes=_get(row, "kept_bytes", dict, where),
        peak_bytes=_get(row, "peak_bytes", dict, where),
        rank=_get(row, "rank", int, where),
        dropout=float(_get(row, "dropout", (int, float), where)),
        passes=passes,
        left_out=row.get("left_out", {}),
        host_ms=_times(row, "host_ms", where) if "host_ms" in row else {},
        predicted_ms=_times(row, "predicted_ms", where) if "predicted_ms" in row else {},
    )


def _times(row: Mapping[str, Any], name: str, where: str) -> dict[str, float]:
    values: dict[str, Any] = _get(row, name, dict, where)
    # a median of nothing makes ratios that mean nothing
    least: Callable[[float], bool] = (lambda v: v > 0) if name == "median_ms" else (lambda v: v >= 0)
    for candidate, value in values.items():
        if not isinstance(value, (int, float)) or not least(value):
            raise ValueError(f"expected a time in ms for {candidate} in {name} of {where}, got {value!r}")
    return values


def _optional(row: Mapping[str, Any], name: str, where: str) -> Any:
    return None if row.get(name) is None else _get(row, name, int, where)


def _get(content: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    if name not in content:
        raise ValueError(f"expected {name!r} in {where}, got none; its entries are {', '.join(content)}")
    value = content[name]
    if not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"expected {name!r} of type {wanted} in {where}, got {value!r}")
    return value
