"""Output of a command that several processes may run: only the first of them speaks."""

import json
from typing import Any

import typer
from rich.console import Console


def make_console(to_stderr: bool) -> Console:
    """A console on stdout, or on stderr where stdout is for a machine."""
    return Console(stderr=to_stderr, quiet=not _is_first())


def print_json(value: Any) -> None:
    """Print a JSON value on stdout."""
    if _is_first():
        typer.echo(json.dumps(value, indent=2))


def _is_first() -> bool:
    # slow to import, as what runs next
    from fastlora._backend import launched_rank

    return launched_rank() == 0
