"""Output of a command that several processes may run: only the first of them speaks."""

import json
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console


def make_console(to_stderr: bool) -> Console:
    """A console on stdout, or on stderr where stdout is for a machine."""
    return Console(stderr=to_stderr, quiet=not _is_first())


def conclude(report: dict[str, Any], show: Callable[[], None], *, as_json: bool) -> None:
    """End the run in all processes, and print its report on stdout, as JSON or as ``show`` does."""
    # as slow to import as what ran
    from fastlora.transfer.training.processes import leave_processes

    leave_processes()
    if not as_json:
        show()
    elif _is_first():
        typer.echo(json.dumps(report, indent=2))


def _is_first() -> bool:
    # slow to import, as what runs next
    from fastlora._backend import launched_rank

    return launched_rank() == 0
