"""``report.html``: one page with everything in it, for people."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastlora.parameters.report import ModuleRow, folded
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.plots import draw_matrix, png
from fastlora.transfer.report import write_file

PAGE, TEMPLATE = "report.html", "transfer/finetune/report.html.jinja"
_THUMBNAIL = 160


def write_page(folder: Path, report: dict[str, Any], images: LabelledImages) -> None:
    """Write ``report.html``, which needs no other file.

    Args:
        folder: Of the run.
        report: What ``report.json`` holds.
        images: Those that were evaluated.
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
        images: Those that were evaluated.
        figures: By the names that the template gives them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["mib"] = lambda value: "–" if value is None else f"{value / 2**20:,.1f} MiB"
    modules = [ModuleRow(**row) for row in report["parameters"]["modules"]]
    return environment.get_template(template).render(
        report=report,
        confusion=_inline(png(_matrix(report["evaluation"]["confusion"], report["classes"]))),
        worst=[(row, _thumbnail(images, row["index"])) for row in report["evaluation"]["worst"]],
        modules=folded([row for row in modules if row.trainable_parameters]),
        **{name: _inline(png(figure)) for name, figure in figures.items()},
    )


def _template(path: str) -> str:
    return resources.files("fastlora").joinpath(path).read_text("utf-8")


def curves(epochs: Sequence[dict[str, Any]], best: int) -> Figure:
    """Losses and accuracies over the epochs, the best one marked.

    Args:
        epochs: As in ``report.json``.
        best: Number of the best epoch, counted from 1.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss, right = figure.subplots(1, 2)
    numbers = [epoch["epoch"] for epoch in epochs]
    for axes, lines in (
        (loss, {"Training": "train_loss", "Validation": "validation_loss"}),
        (right, {"Accuracy": "accuracy", "Balanced accuracy": "balanced_accuracy"}),
    ):
        factor = 1 if axes is loss else 100
        styles = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"))
        for (label, name), (colour, marker, line) in zip(lines.items(), styles, strict=True):
            values = [factor * epoch[name] for epoch in epochs]
            axes.plot(numbers, values, label=label, color=colour, marker=marker, linestyle=line, markersize=4)
        axes.axvline(best, color="grey", linestyle=":", label=f"best epoch ({best})")
        axes.set(xlabel="Epoch", xlim=(min(numbers) - 0.5, max(numbers) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set(title="Loss", ylabel="Cross-entropy (nats)")
    right.set(title="Validation", ylabel="Pictures labelled right (%)")
    return figure


def _matrix(confusion: list[list[int]], classes: Sequence[str]) -> Figure:
    side = max(4.0, 0.62 * len(classes) + 1.2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = draw_matrix(axes, torch.tensor(confusion), classes)
    figure.colorbar(image, ax=axes, label="Share of the true class (%)", shrink=0.8)
    if max(map(len, classes)) * len(classes) > 40:
        axes.tick_params(axis="x", labelrotation=90)
    return figure


def _thumbnail(images: LabelledImages, index: int) -> str:
    found = images.read(index)
    picture = _as_picture(found) if isinstance(found, Tensor) else found
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return _inline(buffer.getvalue())


def _as_picture(pixels: Tensor) -> Image.Image:
    levels = pixels if pixels.dtype == torch.uint8 else (pixels.clamp(0, 1) * 255).to(torch.uint8)
    channels = levels[:3].expand(3, *levels.shape[1:])
    return Image.fromarray(channels.permute(1, 2, 0).numpy())


def _inline(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
