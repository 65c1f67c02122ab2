"""Pictures of a run: learning curves, accuracy against trainable parameters, confusion matrices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox
from torch import Tensor

from fastlora.transfer.report.style import SERIES, draw_line, drawn, heading, headline, new_figure, plain, png

_Horizontal = Literal["left", "center", "right"]
_Vertical = Literal["bottom", "center", "top"]

_SMALL_MATRIX, _MATRICES_PER_ROW = 4, 3
# from here on a cell is too small for its number, and a matrix keeps its size
_LARGE_MATRIX, _LARGE_SIDE, _NAMED_ROWS = 20, 10.0, 40
# pixels around a point's error bar that its marker may cover
_MARKER_RADIUS = 8


class _Place(NamedTuple):
    """Where a label may lie: offsets in points from the point (end 0) or from its bar's end (1 or -1)."""

    right: float
    up: float
    horizontal: _Horizontal
    vertical: _Vertical
    end: int


_SIDES: tuple[tuple[float, _Horizontal], ...] = ((0, "center"), (6, "left"), (-6, "right"))
_ENDS: tuple[tuple[int, _Vertical], ...] = ((1, "bottom"), (-1, "top"))

# from the nearest to the farthest, for labels of two lines
_PLACES = (
    _Place(9, 0, "left", "center", 0),
    _Place(-9, 0, "right", "center", 0),
    *(
        _Place(right, end * up, horizontal, vertical, end)
        for up in (6, 36, 66)
        for right, horizontal in _SIDES
        for end, vertical in _ENDS
    ),
    *(
        _Place(1.5 * right, up, horizontal, "center", 0)
        for up in (36, -36)
        for right, horizontal in _SIDES[1:]
    ),
)


def draw_curves(methods: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Loss and validation accuracy over the training, as a PNG.

    Methods train for different numbers of epochs, so the axis is the share of each one's own training.

    Args:
        methods: Up to five entries of ``methods`` in the demo's ``report.json``.
        title: Model and data.
    """
    figure = new_figure(10, 4.2)
    loss, validation = figure.subplots(1, 2)
    for method, style in zip(methods, SERIES, strict=False):
        epochs = method["epochs"]
        progress = [100 * epoch["epoch"] / len(epochs) for epoch in epochs]
        words = f"{len(epochs)} epoch{'s' * (len(epochs) > 1)}, {method['seconds']:.0f} s"
        label = drawn(f"{method['title']}: {words}", 60)
        draw_line(loss, progress, [epoch["train_loss"] for epoch in epochs], label, style)
        draw_line(validation, progress, [100 * epoch["accuracy"] for epoch in epochs], label, style)
    highest = max(epoch["train_loss"] for method in methods for epoch in method["epochs"])
    heading(loss, "Training loss")
    loss.set(ylabel="Cross-entropy, mean over the epoch (nats)")
    loss.set_ylim(0, 1.08 * highest)
    loss.legend(loc="upper right")
    heading(validation, "Validation accuracy")
    validation.set(ylabel="Pictures labelled right (%)")
    for axes in (loss, validation):
        axes.set(xlabel="Share of the method's training (%)", xlim=(0, 103))
        plain(axes)
    headline(figure, drawn(title, 90))
    return png(figure)


def draw_accuracies(methods: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Test accuracy against trainable parameters, as a PNG; see :func:`accuracy_figure`."""
    return png(accuracy_figure(methods, title))


def accuracy_figure(methods: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Test accuracy with its 95 % interval against trainable parameters, each method labelled.

    Args:
        methods: Up to five entries of ``methods`` in the demo's ``report.json``.
        title: Model and data.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    points = [_scored(method) for method in methods]
    for point, (colour, marker, _) in zip(points, SERIES, strict=False):
        bar = [[point.y - point.low], [point.high - point.y]]
        axes.errorbar(point.x, point.y, yerr=bar, color=colour, marker=marker, markersize=8, capsize=4)
    lowest, highest = min(p.low for p in points), max(p.high for p in points)
    # labels need room above and below the bars, and at least some scale where no accuracy differs
    margin = 0.4 * max(highest - lowest, 2.0)
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xscale("log")
    axes.set_xlim(min(p.x for p in points) / 4, max(p.x for p in points) * 4)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="Trainable parameters (logarithmic)", ylabel="Test pictures labelled right (%)")
    heading(axes, "Bars: 95 % intervals (Wilson)")
    plain(axes)
    headline(figure, drawn(title, 90))
    _label_points(figure, axes, points)
    return figure


class _Point(NamedTuple):
    x: float
    y: float
    low: float
    high: float
    label: str


def _scored(method: Mapping[str, Any]) -> _Point:
    right = 100 * method["accuracy"]
    low, high = (100 * limit for limit in method["accuracy_interval"])
    label = f"{drawn(method['title'])}\n{right:.1f} % ({low:.1f} to {high:.1f})"
    return _Point(method["trainable_parameters"], right, low, high, label)


def _label_points(figure: Figure, axes: Axes, points: Sequence[_Point]) -> None:
    # sizes of text are known only once the layout is
    figure.draw_without_rendering()
    taken = [_bar_box(axes, point) for point in points]
    for point in points:
        candidates = [_label(axes, point, place) for place in _PLACES]
        boxes = [candidate.get_window_extent() for candidate in candidates]
        # the first that hides least; where everything fits, the nearest to its point
        chosen = min(range(len(boxes)), key=lambda n: _hidden(boxes[n], taken, axes.bbox))
        taken.append(boxes[chosen])
        for candidate in candidates[:chosen] + candidates[chosen + 1 :]:
            candidate.remove()


def _label(axes: Axes, point: _Point, place: _Place) -> Annotation:
    label = axes.annotate(
        point.label,
        (point.x, (point.low, point.y, point.high)[place.end + 1]),
        xytext=(place.right, place.up),
        textcoords="offset points",
        ha=place.horizontal,
        va=place.vertical,
        fontsize=10,
    )
    # room is measured in a layout that must not change any more
    label.set_in_layout(False)
    return label


def _bar_box(axes: Axes, point: _Point) -> Bbox:
    ends = [(point.x, point.low), (point.x, point.high)]
    return Bbox(axes.transData.transform(ends)).padded(_MARKER_RADIUS)


def _hidden(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    overlaps = [Bbox.intersection(box, other) for other in taken]
    visible = Bbox.intersection(box, inside)
    outside = _area(box) - (_area(visible) if visible else 0.0)
    return outside + sum(_area(overlap) for overlap in overlaps if overlap)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


def draw_confusions(methods: Sequence[Mapping[str, Any]], classes: Sequence[str], title: str) -> bytes:
    """Confusion matrices, three in a row, as a PNG; see :func:`draw_matrix`.

    Args:
        methods: Entries of ``methods`` in the demo's ``report.json``.
        classes: Name of each label.
        title: Model and data.
    """
    side = matrix_side(len(classes))
    columns = min(len(methods), _MATRICES_PER_ROW)
    rows = math.ceil(len(methods) / columns)
    figure = new_figure(side * columns + 1, (side + 0.6) * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(methods) :]:
        axes.remove()
    panels = panels[: len(methods)]
    for axes, method in zip(panels, methods, strict=True):
        image = draw_matrix(axes, torch.tensor(method["confusion"]), classes)
        scores = f"accuracy {method['accuracy']:.1%}, balanced {method['balanced_accuracy']:.1%}"
        axes.set_title(f"{drawn(method['title'], 40)}\n{scores}", fontsize=11)
    figure.colorbar(image, ax=list(panels), label="Share of the true class (%)", shrink=0.8)
    headline(figure, drawn(title, 90))
    return png(figure)


def draw_matrix(axes: Axes, confusion: Tensor, classes: Sequence[str]) -> AxesImage:
    """One matrix ``[classes, classes]``: counts, coloured by the share of the true class.

    Of many classes the counts are left out, and of very many some names.
    """
    count = len(classes)
    percent = 100 * confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    image = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    small = count <= _SMALL_MATRIX
    if shows_counts(count):
        _write_counts(axes, confusion, percent, small=small)
    axes.set(xlabel="Predicted class", ylabel="True class")
    places = range(0, count, math.ceil(count / _NAMED_ROWS))
    names, size = [drawn(classes[place]) for place in places], 10 if shows_counts(count) else 7
    # a name has to fit under its cell
    upright = len(names) * max(map(len, names)) > 40
    axes.set_xticks(places, names, rotation=90 if upright else 0, fontsize=size)
    lying = small and not upright
    axes.set_yticks(places, names, rotation=90 if lying else 0, va="center", fontsize=size)
    return image


def _write_counts(axes: Axes, confusion: Tensor, percent: Tensor, *, small: bool) -> None:
    for row, (counts, shares) in enumerate(zip(confusion.tolist(), percent.tolist(), strict=True)):
        for column, (count, share) in enumerate(zip(counts, shares, strict=True)):
            text = f"{count}\n{share:.1f}%" if small else (f"{count}\n{share:.0f}%" if count else "")
            colour = "white" if share > 55 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=12 if small else 7)


def matrix_side(count: int) -> float:
    """Height in inches that a matrix of so many classes takes."""
    return max(5.0, 0.62 * count + 1.2) if shows_counts(count) else _LARGE_SIDE


def shows_counts(count: int) -> bool:
    """Whether a matrix of so many classes has its counts written into it."""
    return count <= _LARGE_MATRIX
