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

from fastlora._core.files import check_file_place, printable, safe_cell, write_file
from fastlora._core.words import visible
from fastlora.cli._console import make_console
from fastlora.cli._errors import FAILURE
from fastlora.cli._progress import LiveReporter

_SHOWN = 5


class Output(StrEnum):
    """How answers are printed."""

    table = "table"
    csv = "csv"
    json = "json"


def predict(
    run: Annotated[Path, typer.Argument(help="Folder that fastlora finetune wrote.")],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders that are searched for them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each picture.")] = 1,
    form: Annotated[
        Output,
        typer.Option(
            "--format",
            help="How to print the answers. In csv, text that a spreadsheet would take for a formula begins "
            "with an apostrophe.",
        ),
    ] = Output.table,
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="File to write the answers to, whole or not at all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 32,
    workers: Annotated[
        int, typer.Option(min=0, max=1024, help="Processes that decode pictures; 0 decodes in this one.")
    ] = 0,
) -> None:
    """Name the class of pictures with a fine-tuned model.

    A picture that can't be read is listed with the reason, and costs none of the others' answers; the exit
    code is 1 then.

    [bold]Examples[/bold]: fastlora predict flowers-lora unknown/*.jpg --top 3

    fastlora predict flowers-lora unknown --format csv --output answers.csv --workers 4
    """
    from fastlora.transfer.places import check_pictures, check_run

    if output is not None:
        check_file_place(output)
    check_run(run)
    for place in pictures:
        check_pictures(place)
    # models are slow to import
    from fastlora.transfer.finetune.predict import predict_files
    from fastlora.transfer.finetune.saved import load_run

    with LiveReporter(make_console(to_stderr=True)) as reporter:
        answers = predict_files(
            load_run(run),
            pictures,
            top=top,
            batch_size=batch_size,
            workers=workers,
            on_done=lambda done, total: reporter.advance("predict", done, total, None),
        )
    text = _FORMS[Output.json if as_json else form](answers, to_file=output is not None)
    if output is None:
        # typer would take a colour out of a name
        sys.stdout.write(text)
    else:
        write_file(output, text.encode())
    _tell_unread(answers)


def _tell_unread(answers: list[dict[str, Any]]) -> None:
    unread = [answer for answer in answers if answer["error"] is not None]
    if not unread:
        return
    shown = "; ".join(f"{answer['path']} ({answer['error']})" for answer in unread[:_SHOWN])
    more = "; …" if len(unread) > _SHOWN else ""
    told = f"error: {len(unread)} of {len(answers)} pictures have no answer: {shown}{more}"
    typer.echo(visible(told), err=True)
    raise typer.Exit(FAILURE)


def _as_json(answers: list[dict[str, Any]], *, to_file: bool) -> str:
    return json.dumps(answers, indent=2) + "\n"


def _as_csv(answers: list[dict[str, Any]], *, to_file: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "class", "probability", "error"])
    for answer in answers:
        path, error = (safe_cell(printable(each or "")) for each in (answer["path"], answer["error"]))
        rows = answer["classes"] or [("", None)]
        writer.writerows(
            [path, safe_cell(name), "" if share is None else f"{share:.6f}", error] for name, share in rows
        )
    return text.getvalue()


def _as_table(answers: list[dict[str, Any]], *, to_file: bool) -> str:
    table = Table()
    table.add_column("Picture", overflow="fold")
    table.add_column("Class", overflow="fold")
    table.add_column("Probability", justify="right")
    for answer in answers:
        rows = answer["classes"] or [(f"error: {answer['error']}", None)]
        for place, (name, share) in enumerate(rows):
            table.add_row("" if place else answer["path"], name, "" if share is None else f"{share:.1%}")
    console = make_console()
    if to_file:
        console.file = io.StringIO()
    with console.capture() as captured:
        console.print(table)
    return captured.get()


_FORMS = {Output.table: _as_table, Output.csv: _as_csv, Output.json: _as_json}
