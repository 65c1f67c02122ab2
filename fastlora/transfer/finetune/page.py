"""``report.html``: one page with everything in it, for people."""

import heapq
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastlora._core.files import write_file
from fastlora.parameters.report import ModuleRow, folded
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.plots import draw_matrix, matrix_side, shows_counts
from fastlora.transfer.report.page import page
from fastlora.transfer.report.style import SERIES, draw_line, finish_epochs, heading, new_figure, png

PAGE, TEMPLATE = "report.html", "transfer/finetune/report.html.jinja"
_THUMBNAIL, _CONFUSED = 160, 20


def write_page(folder: Path, report: dict[str, Any], images: LabelledImages) -> None:
    """Write ``report.html``, which needs no other file.

    Args:
        folder: The run's folder.
        report: What ``report.json`` holds.
        images: The pictures that were evaluated.
    """
    figures = {"curves": curves(report["epochs"], report["best_epoch"])}
    write_file(folder / PAGE, render(TEMPLATE, report, images, figures).encode())


def render(
    template: str, report: dict[str, Any], images: LabelledImages, figures: Mapping[str, Figure]
) -> str:
    """A page of its own.

    Args:
        template: Path of a template inside this package.
        report: What ``report.json`` holds.
        images: The pictures that were evaluated.
        figures: Figures by the names that the template gives them.
    """
    modules = [ModuleRow(**row) for row in report["parameters"]["modules"]]
    confusion, classes = report["evaluation"]["confusion"], report["classes"]
    return page(
        template,
        report=report,
        confusion=png(_matrix(confusion, classes)),
        confused=[] if shows_counts(len(classes)) else confused(confusion, classes),
        worst=[(row, _thumbnail(images, row["index"])) for row in report["evaluation"]["worst"]],
        modules=folded([row for row in modules if row.trainable_parameters]),
        **{name: png(figure) for name, figure in figures.items()},
    )


def curves(epochs: Sequence[dict[str, Any]], best: int) -> Figure:
    """Losses and accuracies over the epochs, the best one marked.

    Args:
        epochs: The entry ``epochs`` of ``report.json``.
        best: Number of the best epoch, counted from 1.
    """
    figure = new_figure(10, 3.8)
    loss, right = figure.subplots(1, 2)
    numbers = [epoch["epoch"] for epoch in epochs]
    for axes, lines in (
        (loss, {"Training": "train_loss", "Validation": "validation_loss"}),
        (right, {"Accuracy": "accuracy", "Balanced accuracy": "balanced_accuracy"}),
    ):
        factor = 1 if axes is loss else 100
        for (label, name), style in zip(lines.items(), SERIES, strict=False):
            draw_line(axes, numbers, [factor * epoch[name] for epoch in epochs], label, style)
        finish_epochs(axes, numbers, best, "best epoch")
    heading(loss, "Loss")
    loss.set(ylabel="Cross-entropy (nats)")
    heading(right, "Validation")
    right.set(ylabel="Pictures labelled right (%)")
    return figure


def confused(confusion: list[list[int]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of classes that are most often confused.

    Example:
        >>> confused([[3, 1], [2, 4]], ["cat", "dog"])[0]
        {'true': 'dog', 'predicted': 'cat', 'count': 2, 'share': 0.3333333333333333}
    """
    pairs = (
        (count, true, predicted)
        for true, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    )
    return [
        {
            "true": classes[true],
            "predicted": classes[predicted],
            "count": count,
            "share": count / sum(confusion[true]),
        }
        for count, true, predicted in heapq.nsmallest(_CONFUSED, pairs, key=lambda pair: (-pair[0], pair[1:]))
    ]


def _matrix(confusion: list[list[int]], classes: Sequence[str]) -> Figure:
    side = matrix_side(len(classes))
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    image = draw_matrix(axes, torch.tensor(confusion), classes)
    figure.colorbar(image, ax=axes, label="Share of the true class (%)", shrink=0.8)
    return figure


def _thumbnail(images: LabelledImages, index: int) -> bytes:
    found = images.read(index)
    picture = _as_picture(found) if isinstance(found, Tensor) else found
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _as_picture(pixels: Tensor) -> Image.Image:
    levels = pixels if pixels.dtype == torch.uint8 else (pixels.clamp(0, 1) * 255).to(torch.uint8)
    channels = levels[:3].expand(3, *levels.shape[1:])
    return Image.fromarray(channels.permute(1, 2, 0).numpy())
