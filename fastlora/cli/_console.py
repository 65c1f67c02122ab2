"""What every command prints with: names as they are, JSON for machines, one voice of several processes."""

import json
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from fastlora._core.words import visible

_PIPE_WIDTH = 120


class _PlainConsole(Console):
    """Takes a string for one line from outside: no markup, control characters shown as escapes.

    What has styles or several lines of its own is given as a ``Text``.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """The string as what is drawn, in tables and titles too."""
        return super().render_str(visible(text), **options)


def make_console(*, to_stderr: bool = False) -> Console:
    """A console on stdout, or on stderr where stdout is for a machine; of several processes, one speaks."""
    # slow to import, as what runs next
    from fastlora._core.backend import launched_rank

    console = _PlainConsole(
        stderr=to_stderr, quiet=launched_rank() != 0, markup=False, emoji=False, highlight=False
    )
    if not console.is_terminal:
        # a pipe has no width of its own to fit into
        console.width = max(console.width, _PIPE_WIDTH)
    return console


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
