"""A live progress bar per task: steps, rate, time left and loss."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class LiveReporter:
    """Shows notes and the progress of named tasks on a console while inside its ``with`` block.

    Args:
        console: Where to draw; without a terminal behind it, each bar is printed once, at the end.
    """

    def __init__(self, console: Console) -> None:
        """See the class."""
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text)

    def advance(
        self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        """Move a task's bar, with the loss and the peak memory in bytes; the first call draws it."""
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, loss="")
        shown = ([] if loss is None else [f"loss {loss:.3f}"]) + (
            [] if memory is None else [f"{memory / 2**20:,.0f} MiB"]
        )
        self._progress.update(self._tasks[task], completed=done, loss="  ".join(shown))


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")
