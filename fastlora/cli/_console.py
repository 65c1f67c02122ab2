"""The console of every command: it shows names as they are, whatever they hold."""

from typing import Any

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
