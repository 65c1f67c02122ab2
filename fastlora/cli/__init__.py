"""The command line: ``fastlora COMMAND``. One file per command.

A command's file imports at its top only what its options need; what is slow to import (torch, models, plots)
is imported when the command runs and its paths are there, so that ``--help`` and a mistyped path answer at
once.
"""

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fastlora._version import __version__
from fastlora.cli import (
    adapt,
    bench,
    demo,
    diagnose,
    doctor,
    export,
    finetune,
    kernels,
    params,
    plan,
    predict,
    tune,
)
from fastlora.cli._errors import CommandGroup
from fastlora.cli._options import paragraphs


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastlora {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="fastlora",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Parameter-efficient fine-tuning with fused kernels: exact, lean and fast on GPU and CPU.",
    epilog="To begin: fastlora params vit_b_16, which needs no data and no GPU. Examples of a command: "
    "fastlora COMMAND --help.",
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """What stands before a command."""


_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Train and use models": {
        "demo": demo.demo,
        "finetune": finetune.make_command(),
        "predict": predict.predict,
        "export": export.export,
        "adapt": adapt.make_command(),
    },
    "Compare and check": {"params": params.params, "diagnose": diagnose.diagnose, "doctor": doctor.doctor},
    "Kernels and GPUs": {"plan": plan.plan, "tune": tune.tune, "kernels": kernels.kernels},
}
for panel, commands in _COMMANDS.items():
    for name, command in commands.items():
        app.command(name, help=paragraphs(command), rich_help_panel=panel)(command)
app.add_typer(bench.app, rich_help_panel="Kernels and GPUs")


def main() -> None:
    """Run the command line and leave with exit code 0 (done), 1 (failed) or 2 (bad usage or input)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that can't show a class's name is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    app()
