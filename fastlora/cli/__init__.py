"""The command line: ``fastlora COMMAND``. One file per command.

A command's file imports at its top only what its options need; what is slow to import (torch, models, plots)
is imported when the command runs and its paths are there, so that ``--help`` and a mistyped path answer at
once.
"""

import io
import sys

import typer

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

app = typer.Typer(
    name="fastlora",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Parameter-efficient fine-tuning with fused kernels: exact, lean and fast on GPU and CPU.",
)


app.command("demo")(demo.demo)
app.command("finetune")(finetune.make_command())
app.command("adapt")(adapt.make_command())
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("diagnose")(diagnose.diagnose)
app.command("kernels")(kernels.kernels)
app.command("params")(params.params)
app.add_typer(bench.app)
app.command("plan")(plan.plan)
app.command("tune")(tune.tune)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line and leave with exit code 0 (done), 1 (failed) or 2 (bad usage or input)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that can't show a class's name is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    app()
