"""Pictures of a run: learning curves and confusion matrices."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from fastlora.transfer.metrics import accuracy, balanced_accuracy
from fastlora.transfer.report import MethodResult

# Okabe and Ito's palette: told apart with any colour vision; markers and line styles differ as well
_STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "-"), ("#009E73", "^", "--"))
_SMALL_MATRIX = 4


def draw_curves(results: Sequence[MethodResult], title: str) -> bytes:
    """Loss and validation accuracy over the training, as a PNG.

    Methods train for different numbers of epochs, so the axis is the share of each one's own training.

    Args:
        results: Up to three methods.
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
    return _png(figure)


def draw_confusions(results: Sequence[MethodResult], classes: Sequence[str], title: str) -> bytes:
    """Confusion matrices side by side, as a PNG: counts, coloured by the share of the true class.

    Args:
        results: The methods.
        classes: Name of each label.
        title: Model and data.
    """
    side = max(4.0, 0.62 * len(classes) + 1.2)
    figure = Figure(figsize=(side * len(results) + 1, side + 0.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        image = _draw_matrix(axes, result.confusion, classes)
        scores = (
            f"accuracy {accuracy(result.confusion):.1%}, balanced {balanced_accuracy(result.confusion):.1%}"
        )
        axes.set_title(f"{result.title}\n{scores}", fontsize=11)
    figure.colorbar(image, ax=list(panels), label="Share of the true class (%)", shrink=0.8)
    figure.suptitle(title)
    return _png(figure)


def _draw_matrix(axes: Axes, confusion: Tensor, classes: Sequence[str]) -> AxesImage:
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
