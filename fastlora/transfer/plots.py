"""Pictures of a run: learning curves, accuracy against trainable parameters, confusion matrices."""

import io
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox
from torch import Tensor

from fastlora.transfer.metrics import accuracy, accuracy_standard_error, balanced_accuracy
from fastlora.transfer.report import MethodResult

# Okabe and Ito's palette: told apart with any colour vision; markers and line styles differ as well
_STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "-"),
    ("#009E73", "^", "--"),
    ("#CC79A7", "D", "-."),
    ("#000000", "v", ":"),
)
_Horizontal = Literal["left", "center", "right"]
_Vertical = Literal["bottom", "center", "top"]

_SMALL_MATRIX, _MATRICES_PER_ROW = 4, 3
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


def draw_curves(results: Sequence[MethodResult], title: str) -> bytes:
    """Loss and validation accuracy over the training, as a PNG.

    Methods train for different numbers of epochs, so the axis is the share of each one's own training.

    Args:
        results: Up to five methods.
        title: Model and data.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, validation = figure.subplots(1, 2)
    for result, (colour, marker, line) in zip(results, _STYLES, strict=False):
        epochs = len(result.history)
        progress = [100 * epoch.epoch / epochs for epoch in result.history]
        marks = {
            "color": colour,
            "marker": marker,
            "linestyle": line,
            "markersize": 4,
            "markevery": max(1, epochs // 10),
        }
        label = f"{result.title}: {epochs} epoch{'s' * (epochs > 1)}, {result.seconds:.0f} s"
        loss.plot(progress, [epoch.loss for epoch in result.history], label=label, **marks)
        right = [100 * epoch.validation_accuracy for epoch in result.history]
        validation.plot(progress, right, label=label, **marks)
    highest = max(epoch.loss for result in results for epoch in result.history)
    loss.set(title="Training loss", ylabel="Cross-entropy, mean over the epoch (nats)")
    loss.set_ylim(0, 1.08 * highest)
    loss.legend(loc="upper right")
    validation.set(title="Validation accuracy", ylabel="Pictures labelled right (%)")
    for axes in (loss, validation):
        axes.set(xlabel="Share of the method's training (%)", xlim=(0, 103))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return png(figure)


def draw_accuracies(results: Sequence[MethodResult], title: str) -> bytes:
    """Test accuracy against trainable parameters, as a PNG; see :func:`accuracy_figure`."""
    return png(accuracy_figure(results, title))


def accuracy_figure(results: Sequence[MethodResult], title: str) -> Figure:
    """Test accuracy with its standard error against trainable parameters, each method labelled.

    Args:
        results: Up to five methods.
        title: Model and data.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    points = [_scored(result) for result in results]
    for point, (colour, marker, _) in zip(points, _STYLES, strict=False):
        axes.errorbar(
            point.x, point.y, yerr=point.error, color=colour, marker=marker, markersize=8, capsize=4
        )
    lowest, highest = (min(p.y - p.error for p in points), max(p.y + p.error for p in points))
    # labels need room above and below the bars, and at least some scale where no accuracy differs
    margin = 0.25 * max(highest - lowest, 2.0)
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xscale("log")
    axes.set_xlim(min(p.x for p in points) / 4, max(p.x for p in points) * 4)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="Trainable parameters (logarithmic)", ylabel="Test pictures labelled right (%)")
    axes.set_title("Bars: one binomial standard error each way", fontsize=10)
    axes.grid(alpha=0.3)
    figure.suptitle(title)
    _label_points(figure, axes, points)
    return figure


class _Point(NamedTuple):
    x: float
    y: float
    error: float
    label: str


def _scored(result: MethodResult) -> _Point:
    right, error = (100 * score(result.confusion) for score in (accuracy, accuracy_standard_error))
    return _Point(result.parameters[0], right, error, f"{result.title}\n{right:.1f} ± {error:.1f}%")


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
        (point.x, point.y + place.end * point.error),
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
    ends = [(point.x, point.y - point.error), (point.x, point.y + point.error)]
    return Bbox(axes.transData.transform(ends)).padded(_MARKER_RADIUS)


def _hidden(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    overlaps = [Bbox.intersection(box, other) for other in taken]
    visible = Bbox.intersection(box, inside)
    outside = _area(box) - (_area(visible) if visible else 0.0)
    return outside + sum(_area(overlap) for overlap in overlaps if overlap)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


def draw_confusions(results: Sequence[MethodResult], classes: Sequence[str], title: str) -> bytes:
    """Confusion matrices, three in a row, as a PNG: counts, coloured by the share of the true class.

    Args:
        results: The methods.
        classes: Name of each label.
        title: Model and data.
    """
    side = max(4.0, 0.62 * len(classes) + 1.2)
    columns = min(len(results), _MATRICES_PER_ROW)
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(side * columns + 1, (side + 0.6) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(results) :]:
        axes.remove()
    panels = panels[: len(results)]
    for axes, result in zip(panels, results, strict=True):
        image = draw_matrix(axes, result.confusion, classes)
        scores = (
            f"accuracy {accuracy(result.confusion):.1%}, balanced {balanced_accuracy(result.confusion):.1%}"
        )
        axes.set_title(f"{result.title}\n{scores}", fontsize=11)
    figure.colorbar(image, ax=list(panels), label="Share of the true class (%)", shrink=0.8)
    figure.suptitle(title)
    return png(figure)


def draw_matrix(axes: Axes, confusion: Tensor, classes: Sequence[str]) -> AxesImage:
    """One matrix ``[classes, classes]``: counts, coloured by the share of the true class."""
    percent = 100 * confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    image = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    small = len(classes) <= _SMALL_MATRIX
    for row in range(len(classes)):
        for column in range(len(classes)):
            count, share = int(confusion[row, column]), float(percent[row, column])
            text = f"{count}\n{share:.1f}%" if small else (f"{count}\n{share:.0f}%" if count else "")
            colour = "white" if share > 55 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=12 if small else 7)
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes, rotation=90 if small else 0, va="center")
    return image


def png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
