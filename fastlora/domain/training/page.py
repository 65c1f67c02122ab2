"""``report.html`` of an adaptation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastlora.transfer.data import LabelledImages
from fastlora.transfer.finetune.page import PAGE, draw_line, render
from fastlora.transfer.report import write_file

TEMPLATE = "domain/training/report.html.jinja"
_STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":"))


def write_page(folder: Path, report: dict[str, Any], images: LabelledImages, embedding: Figure) -> None:
    """Write ``report.html``, which needs no other file.

    Args:
        folder: Of the run.
        report: What ``report.json`` holds.
        images: Those that were evaluated.
        embedding: Of the features, before and after.
    """
    figures = {"curves": curves(report["epochs"], report["best_epoch"]), "embedding": embedding}
    write_file(folder / PAGE, render(TEMPLATE, report, images, figures).encode())


def curves(epochs: Sequence[dict[str, Any]], kept: int) -> Figure:
    """Accuracies, how far the domains are told apart, and the scores to select by, over the epochs.

    Args:
        epochs: As in ``report.json``.
        kept: Number of the epoch that was kept, counted from 1.
    """
    figure = Figure(figsize=(13, 3.9), layout="constrained")
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
    accuracies.set(title="Accuracy", ylabel="Pictures labelled right (%)")
    _draw(domains, epochs, {"domain classifier right": "domain_accuracy", "λ": "strength"})
    domains.set(title="Reversal", ylabel="Share of 1")
    _draw(distance, epochs, {"proxy A-distance": "a_distance"})
    distance.set(title="How far apart the features are", ylabel="0 (alike) to 2", ylim=(-0.05, 2.05))
    for axes in (accuracies, domains, distance):
        axes.axvline(kept, color="grey", linestyle=":", label=f"kept ({kept})")
        axes.set(xlabel="Epoch", xlim=(0.5, len(epochs) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _draw(axes: Axes, epochs: Sequence[dict[str, Any]], lines: dict[str, str], factor: float = 1) -> None:
    numbers = [epoch["epoch"] for epoch in epochs]
    for (label, name), style in zip(lines.items(), _STYLES, strict=False):
        if epochs[0][name] is not None:
            values = [factor * epoch[name] for epoch in epochs]
            draw_line(axes, numbers, values, label, style)
