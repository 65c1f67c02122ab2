"""``fastlora predict``: what a fine-tuned model says of pictures."""

import csv
import io
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fastlora.cli._console import make_console


class Output(StrEnum):
    """How answers are printed."""

    table = "table"
    csv = "csv"
    json = "json"


def predict(
    run: Annotated[Path, typer.Argument(help="Folder that fastlora finetune wrote.")],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders that are searched for them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each picture.")] = 1,
    output: Annotated[Output, typer.Option("--format", help="How to print the answers.")] = Output.table,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 32,
) -> None:
    """Name the class of pictures with a fine-tuned model.

    [bold]Example[/bold]: fastlora predict flowers-lora unknown/*.jpg --top 3
    """
    from fastlora.transfer.places import check_pictures, check_run

    check_run(run)
    for place in pictures:
        check_pictures(place)
    # models are slow to import
    from fastlora.transfer.finetune.predict import predict_files
    from fastlora.transfer.finetune.saved import load_run

    answers = predict_files(load_run(run), pictures, top=top, batch_size=batch_size)
    if as_json or output is Output.json:
        typer.echo(json.dumps(answers, indent=2))
    elif output is Output.csv:
        # typer would take a colour out of a name
        sys.stdout.write(_as_csv(answers))
    else:
        _show(answers)


def _as_csv(answers: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "class", "probability"])
    for answer in answers:
        writer.writerows([answer["path"], name, f"{share:.6f}"] for name, share in answer["classes"])
    return text.getvalue()


def _show(answers: list[dict[str, Any]]) -> None:
    table = Table()
    table.add_column("Picture", overflow="fold")
    table.add_column("Class", overflow="fold")
    table.add_column("Probability", justify="right")
    for answer in answers:
        for place, (name, share) in enumerate(answer["classes"]):
            table.add_row("" if place else answer["path"], name, f"{share:.1%}")
    make_console().print(table)
