"""The roofline: how near layers come to what a GPU's memory and matrix units allow, measured or predicted."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from fastlora.bench.predictions import Prediction, Predictions
from fastlora.bench.results import EAGER, GRAPHS, OURS, PEFT, Results, Row
from fastlora.bench.style import colour, label
from fastlora.transfer.report.style import INK, headline, new_figure, plain

_SHOWN = (EAGER, PEFT, OURS)
_MARKERS = {OURS: "o", PEFT: "s", EAGER: "D"}


def roofline_figure(results: Results, predictions: Predictions) -> Figure:
    """Attained TFLOP/s against operations per byte under the roof of a GPU.

    Filled markers were measured; hollow, dashed ones are predicted.
    """
    target = predictions.target
    rows = measured_rows(results)
    figure = new_figure(10, 5.6)
    axes = figure.subplots()
    points = [(p.intensity, p.tflops) for p in predictions.points]
    points += [(row.intensity, row.tflops(name)) for row in rows for name in _SHOWN if name in row.median_ms]
    knee = target.tensor_tflops * 1e3 / target.bandwidth
    lowest = 0.5 * min([x for x, _ in points] + [knee / 4])
    highest = 2.0 * max([x for x, _ in points] + [knee * 4])
    _draw_roof(axes, predictions, lowest, highest)
    floor = min([y for _, y in points] + [lowest * target.bandwidth / 1e3])
    axes.set(xscale="log", yscale="log", xlim=(lowest, highest), ylim=(0.6 * floor, 2 * target.tensor_tflops))
    handles: list[Artist] = [
        _draw_measured(axes, rows, name) for name in _SHOWN if any(name in r.median_ms for r in rows)
    ]
    # dots of many measured layers leave no room for numbers
    handles.append(_draw_predicted(axes, predictions.points, numbered=not rows))
    if not rows:
        _key(axes, predictions.points)
    axes.set_xlabel("Operations per byte, each tensor moved once in either pass (FLOP/B, logarithmic)")
    axes.set_ylabel("Attained (TFLOP/s, logarithmic)")
    plain(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(handles=handles, loc="lower right", fontsize=9, framealpha=1, edgecolor="none")
    kind = "measured and predicted" if rows else "predicted, nothing measured"
    headline(figure, f"Roofline of {target.card}: LoRA forward + backward, 16 bits, r = 16 ({kind})")
    return figure


def measured_rows(results: Results) -> list[Row]:
    """Rows that may stand under a GPU's roof of 16-bit products."""
    if results.kind != "gpu":
        return []
    return [
        row
        for row in results.timed
        if row.suite in ("layers", GRAPHS) and row.passes == "forward_backward" and row.dtype != "fp32"
        if row.flops and row.least_bytes
    ]


def _draw_roof(axes: Axes, predictions: Predictions, lowest: float, highest: float) -> None:
    target = predictions.target
    intensity = np.geomspace(lowest, highest, 200)
    roof = np.minimum(target.tensor_tflops, intensity * target.bandwidth / 1e3)
    axes.plot(intensity, roof, color=INK, linewidth=2)
    axes.fill_between(intensity, roof, 1e6, color="#f3f3f3", linewidth=0)
    axes.annotate(
        f"16-bit peak, {target.tensor_tflops:,.0f} TFLOP/s (data sheet)",
        (highest, target.tensor_tflops),
        xytext=(-6, 5),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )
    middle = (lowest * target.tensor_tflops * 1e3 / target.bandwidth) ** 0.5
    axes.annotate(
        f"memory, {target.bandwidth:,.0f} GB/s\n(data sheet)",
        (middle, middle * target.bandwidth / 1e3),
        xytext=(-8, 8),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )


def _draw_measured(axes: Axes, rows: Sequence[Row], candidate: str) -> Line2D:
    chosen = [row for row in rows if candidate in row.median_ms]
    looks: dict[str, Any] = {
        "color": colour(candidate),
        "marker": _MARKERS[candidate],
        "linestyle": "none",
        "markersize": 6,
    }
    axes.plot(
        [row.intensity for row in chosen], [row.tflops(candidate) for row in chosen], alpha=0.8, **looks
    )
    return Line2D([], [], label=f"{label(candidate)}, measured", **looks)


def _draw_predicted(axes: Axes, points: Sequence[Prediction], *, numbered: bool) -> PathCollection:
    looks: dict[str, Any] = {
        "facecolor": "white",
        "edgecolor": colour(OURS),
        "linestyle": (0, (2, 1.2)),
        "linewidth": 1.3,
    }
    places = [(point.intensity, point.tflops) for point in points]
    for number, place in enumerate(places):
        axes.scatter(*place, s=75, zorder=3, **looks)
        if numbered:
            right, up = _freest(axes, places, number)
            axes.annotate(
                str(number + 1),
                place,
                xytext=(12 * right, 12 * up),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=9,
                color=colour(OURS),
            )
    return axes.scatter([], [], s=75, label="fastlora, predicted", **looks)


def _freest(axes: Axes, places: Sequence[tuple[float, float]], number: int) -> tuple[int, int]:
    """Direction in which a point's number is farthest from all other points."""
    spans = [math.log(high / low) for low, high in (axes.get_xlim(), axes.get_ylim())]
    # as shares of the figure's width, which its height is about half of
    flat = [(math.log(x) / spans[0], math.log(y) / spans[1] / 2) for x, y in places]
    x, y = flat.pop(number)

    def room(direction: tuple[int, int]) -> float:
        return min(
            (math.dist((x + 0.02 * direction[0], y + 0.02 * direction[1]), other) for other in flat),
            default=0,
        )

    return max(((1, 0), (-1, 0), (0, 1), (0, -1)), key=room)


def _key(axes: Axes, points: Sequence[Prediction]) -> None:
    lines = [f"{number}  {point.name}: {point.overhead:.2f}×" for number, point in enumerate(points, start=1)]
    text = "\n".join(["Predicted time over the frozen layer's", *lines])
    box = {"facecolor": "white", "edgecolor": "none"}
    axes.text(
        0.985, 0.13, text, transform=axes.transAxes, ha="right", fontsize=9, color=INK, ma="left", bbox=box
    )
