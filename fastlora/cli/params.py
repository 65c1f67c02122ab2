"""``fastlora params``: what each way to fine-tune a model trains, and what that costs in memory."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fastlora.cli._console import make_console
from fastlora.cli._progress import LiveReporter
from fastlora.cli._weight import Weight

if TYPE_CHECKING:
    from fastlora.transfer.costs.counting import StrategyCost
    from fastlora.transfer.costs.rows import CostSettings
    from fastlora.transfer.models.weightless import ModelSpec


_FROM_HERE_GIB = 25 * 2**30


class Dtype(StrEnum):
    """Dtypes of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def params(
    model: Annotated[
        str,
        typer.Argument(help="Any model of fastlora finetune, or llama-7b."),
    ],
    rank: Annotated[int, typer.Option(min=1, help="Rank of every LoRA update.")] = 16,
    adapter_size: Annotated[int, typer.Option(min=1, help="Width of every adapter's bottleneck.")] = 64,
    num_tokens: Annotated[int, typer.Option(min=1, help="Number of prompt tokens.")] = 10,
    # as it was called before finetune had --num-tokens
    prompts: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images or texts in a batch.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=1, help="Number of tokens in a text.")] = 512,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Outputs of an image model; 1000 without it.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Dtype of the weights; without it bfloat16 for llama-7b, else float32."),
    ] = None,
    weight: Annotated[
        Weight,
        typer.Option(
            help="How the weights of frozen linear layers are stored: as the rest, NF4 with nested "
            "statistics, int8 with a factor for every row, or FP8 with one for 128 x 128 values (fp8) or "
            "for every row (fp8-rows)."
        ),
    ] = Weight.dense,
    details: Annotated[
        str | None, typer.Option(help="Also list the modules under this strategy: lora, for example.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also train a few steps of each on a GPU, if there is one: peak memory and seconds a step.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.")] = False,
) -> None:
    """Compare ways to fine-tune a model: trainable parameters, and what training them keeps in memory.

    Full fine-tuning, last layers, LoRA, adapters, prompts and a linear probe, with AdamW. Nothing is
    downloaded and no weights are held: even llama-7b (about 7 billion parameters) takes seconds. Kept
    activations are what a forward pass in train mode leaves for backward, without the loss; for LoRA an upper
    bound, because layers count one by one, also those that compute together and keep less.

    [bold]Example[/bold]: fastlora params vit_b_16 --rank 8 --batch-size 32
    """
    # models are slow to import
    from fastlora.transfer.costs.rows import CostSettings
    from fastlora.transfer.models.weightless import ModelSpec

    console = make_console(to_stderr=True)
    spec = ModelSpec(model, num_classes, None if dtype is None else dtype.value, batch_size, sequence_length)
    stored: Any = None if weight is Weight.dense else weight.value
    if measure and stored is not None:
        raise ValueError(
            f"expected --measure with --weight dense, got {stored}: what trains there is not quantised"
        )
    settings = CostSettings(rank, adapter_size, prompts or num_tokens, stored)
    costs = _costs(spec, settings, details, console)
    if measure:
        costs = _measured(costs, spec, settings, console)
    if as_json:
        typer.echo(json.dumps(_record(costs, spec, settings), indent=1))
    else:
        _show(costs, spec, details, make_console(), stored)


def _costs(
    spec: "ModelSpec", settings: "CostSettings", details: str | None, console: Console
) -> "list[StrategyCost]":
    from fastlora.transfer.costs.counting import compare
    from fastlora.transfer.costs.rows import ROWS, find_row

    if details is not None:
        find_row(details)
    costs = []
    with LiveReporter(console) as reporter:
        for cost in compare(spec, settings):
            costs.append(cost)
            reporter.show(f"counting {spec.name}", len(costs), len(ROWS))
    return costs


def _measured(
    costs: "Sequence[StrategyCost]", spec: "ModelSpec", settings: "CostSettings", console: Console
) -> "list[StrategyCost]":
    from fastlora.transfer.costs.measure import Unmeasured, measured

    done = []
    for cost in costs:
        if cost.report is not None:
            console.print(f"training a few steps: {cost.title}")
            try:
                found = measured(spec, cost.strategy, settings, expected_bytes=cost.report.training_bytes)
                cost = replace(cost, measured=found)
            except Unmeasured as error:
                console.print(f"  {error}")
        done.append(cost)
    return done


def _record(costs: "Sequence[StrategyCost]", spec: "ModelSpec", settings: "CostSettings") -> dict[str, Any]:
    from fastlora.transfer.costs.usual import verdicts

    resolved = {"dtype": str(spec.torch_dtype).removeprefix("torch.")}
    return {
        "model": asdict(spec) | resolved,
        "settings": asdict(settings),
        "strategies": [cost.as_json() for cost in costs],
        "usual_percentages": verdicts(costs),
    }


def _show(
    costs: "Sequence[StrategyCost]",
    spec: "ModelSpec",
    details: str | None,
    console: Console,
    stored: str | None,
) -> None:
    from fastlora.transfer.costs.usual import sentences, verdicts

    console.print(_table(costs, spec, stored))
    lines = [*_notes(costs), *sentences(verdicts(costs))]
    for line in lines:
        console.print(line)
    for cost in costs:
        if cost.strategy == details:
            # as wide as it is: a folded name can't be searched for
            typer.echo(f"\n{cost.title}\n{cost.report or cost.note}")


def _table(costs: "Sequence[StrategyCost]", spec: "ModelSpec", stored: str | None) -> Table:
    from fastlora.transfer.models.weightless import build, describe_input

    reports = [cost.report for cost in costs if cost.report is not None]
    large = max(report.training_bytes for report in reports) >= _FROM_HERE_GIB
    unit, scale = ("GiB", 2**30) if large else ("MiB", 2**20)
    dtype = str(spec.torch_dtype).removeprefix("torch.")
    if stored is not None:
        dtype += f", frozen linear layers in {stored}"
    # narrow enough for a terminal of 80 columns
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=f"{spec.name} in {dtype}, {describe_input(spec, build(spec))}",
        caption=f"Memory in {unit}. Added: % without the head. Weights: with buffers. Kept: for backward.",
    )
    measured = any(cost.measured is not None for cost in costs)
    table.add_column("Strategy")
    headings = ["Trains", "%", "Added", "Weights", "Grads", "AdamW", "Kept", "Sum"]
    for heading in headings + ["Measured", "s/step"] * measured:
        table.add_column(heading, justify="right")
    for cost in costs:
        table.add_row(cost.title, *_cells(cost, scale, measured))
    return table


def _cells(cost: "StrategyCost", scale: int, measured: bool) -> list[str]:
    from fastlora._core.text import readable_percent

    report = cost.report
    if report is None:
        return ["-"] * (8 + 2 * measured)
    sizes = [
        report.weight_bytes + report.buffer_bytes,
        report.gradient_bytes,
        report.optimizer_bytes,
        report.kept_bytes,
        report.training_bytes,
        *([cost.measured.peak_bytes if cost.measured else None] if measured else []),
    ]
    seconds = [f"{cost.measured.step_seconds:.3g}" if cost.measured else "-"] if measured else []
    percents = [report.trainable_percent, cost.added_percent]
    return [
        f"{report.trainable_parameters:,}",
        *("-" if percent is None else readable_percent(percent) for percent in percents),
        *("-" if size is None else _size(size / scale) for size in sizes),
        *seconds,
    ]


def _size(value: float) -> str:
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _notes(costs: "Sequence[StrategyCost]") -> list[str]:
    by_note: dict[str, list[str]] = {}
    for cost in costs:
        if cost.note:
            by_note.setdefault(cost.note, []).append(cost.title)
    return [f"{'; '.join(titles)}: {note}." for note, titles in by_note.items()]
