"""The end of a command that several processes may run: only the first of them speaks."""

import json
from collections.abc import Callable
from typing import Any

import typer


def conclude(report: dict[str, Any], show: Callable[[], None], *, as_json: bool) -> None:
    """End the run in all processes, and print its report on stdout, as JSON or as ``show`` does."""
    # as slow to import as what ran
    from fastlora._core.backend import launched_rank
    from fastlora.transfer.training.processes import leave_processes

    leave_processes()
    if not as_json:
        show()
    elif launched_rank() == 0:
        typer.echo(json.dumps(report, indent=2))
