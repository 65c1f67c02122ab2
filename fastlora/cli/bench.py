"""``fastlora bench``: what the benchmarks measured, as a page for people."""

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli._console import make_console
from fastlora.cli._options import paragraphs

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Show what `make bench`, `make bench-gpu` and `make gpu-check` measured.",
)


@app.callback()
def bench() -> None:
    """Show what `make bench`, `make bench-gpu` and `make gpu-check` measured."""


def report(
    results: Annotated[
        Path, typer.Argument(help="Results file (JSON) of make bench, make bench-gpu or make gpu-check.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; without it, beside the file, under its name.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU whose roof and predictions are drawn; without it, the measured one, or H100."),
    ] = None,
) -> None:
    """Make one self-contained HTML page, with its figures as PNGs beside it, from a results file.

    Speed-ups over PEFT and the eager formula, overheads over the frozen layer, a roofline, memory, and every
    case that is lost. What is predicted and not measured says so.

    [bold]Example[/bold]: fastlora bench report benchmarks/results/amd-epyc-2026-11-28.json --gpu H100
    """
    from fastlora.bench.results import load_results

    load_results(results)
    # figures are slow to import
    from fastlora.bench.page import write_report

    page, *pictures = write_report(results, output, gpu)
    make_console().print(f"Wrote {page} and {len(pictures)} figures beside it.", soft_wrap=True)


app.command(help=paragraphs(report))(report)
