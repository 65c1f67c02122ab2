"""``report.html`` of an adaptation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastlora._core.files import write_file
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.finetune.page import PAGE, render
from fastlora.transfer.report.style import SERIES, draw_line, finish_epochs, heading, new_figure

TEMPLATE = "domain/training/report.html.jinja"


def write_page(folder: Path, report: dict[str, Any], images: LabelledImages, embedding: Figure) -> None:
    """Write ``report.html``, which needs no other file.

    Args:
        folder: The run's folder.
        report: What ``report.json`` holds.
        images: The pictures that were evaluated.
        embedding: Figure of the features before and after.
    """
    figures = {"curves": curves(report["epochs"], report["best_epoch"]), "embedding": embedding}
    write_file(folder / PAGE, render(TEMPLATE, report, images, figures).encode())


def curves(epochs: Sequence[dict[str, Any]], kept: int) -> Figure:
    """Accuracies, how far the domains are told apart, and the scores to select by, over the epochs.

    Args:
        epochs: The entry ``epochs`` of ``report.json``.
        kept: Number of the epoch that was kept, counted from 1.
    """
    figure = new_figure(13, 3.9)
    accuracies, domains, distance = figure.subplots(1, 3)
    _draw(
        accuracies,
        epochs,
        {
            "source (held out)": "accuracy",
            "target (oracle)": "target_accuracy",
            "target, balanced (oracle)": "target_balanced_accuracy",
        },
        100,
    )
    heading(accuracies, "Accuracy")
    accuracies.set(ylabel="Pictures labelled right (%)")
    _draw(domains, epochs, {"domain classifier right": "domain_accuracy", "λ": "strength"})
    heading(domains, "Alignment")
    domains.set(ylabel="Share of 1")
    _draw(distance, epochs, {"proxy A-distance": "a_distance"})
    heading(distance, "How far apart the features are")
    distance.set(ylabel="0 (alike) to 2", ylim=(-0.05, 2.05))
    for axes in (accuracies, domains, distance):
        finish_epochs(axes, [epoch["epoch"] for epoch in epochs], kept, "kept")
    return figure


def _draw(axes: Axes, epochs: Sequence[dict[str, Any]], lines: dict[str, str], factor: float = 1) -> None:
    numbers = [epoch["epoch"] for epoch in epochs]
    for (label, name), style in zip(lines.items(), SERIES, strict=False):
        if epochs[0][name] is not None:
            values = [factor * epoch[name] for epoch in epochs]
            draw_line(axes, numbers, values, label, style)
