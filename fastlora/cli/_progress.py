"""Progress of named tasks: bars on a terminal, now and then a line in a log."""

import time
from collections.abc import Callable
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

_SECONDS_BETWEEN_LINES = 5.0


class LiveReporter:
    """Shows notes and the progress of named tasks on a console while inside its ``with`` block.

    Args:
        console: Where to show it. On a terminal every task has a bar; elsewhere a task has a line when it
            begins, when it is done, and every few seconds between.
        clock: Seconds that pass.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """See the class."""
        self._clock, self._console = clock, console
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[words]}", markup=False),
            console=console,
            get_time=clock,
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; what ended early and well, by patience say, is done."""
        for name, task in self._by_name().items():
            if error is None and not task.finished:
                self.show(name, int(task.completed), int(task.completed), task.fields["words"])
        if self._console.is_terminal:
            self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text)

    def advance(
        self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        """Say how far a task is, with the loss and the peak memory in bytes."""
        shown = ([] if loss is None else [f"loss {loss:.3f}"]) + (
            [] if memory is None else [f"{memory / 2**20:,.0f} MiB"]
        )
        self.show(task, done, total, "  ".join(shown))

    def show(self, task: str, done: int, total: int, words: str = "") -> None:
        """Say how far a task is, in its own words; the first call of a task begins it."""
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, words="")
        self._progress.update(self._tasks[task], completed=done, total=total, words=words)
        if not self._console.is_terminal:
            self._tell(task)

    def _tell(self, name: str) -> None:
        task, now = self._by_name()[name], self._clock()
        if name in self._told and not task.finished and now - self._told[name] < _SECONDS_BETWEEN_LINES:
            return
        self._told[name] = now
        parts = (
            f"{name}: {task.completed:,.0f} of {task.total or 0:,.0f} ({task.percentage:.0f} %)",
            _rate(task),
            f"{task.time_remaining:.0f} s left" if task.time_remaining and not task.finished else "",
            task.fields["words"],
        )
        self._console.print(", ".join(filter(None, parts)), soft_wrap=True)

    def _by_name(self) -> dict[str, Task]:
        tasks = {task.id: task for task in self._progress.tasks}
        return {name: tasks[number] for name, number in self._tasks.items()}


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task))


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    return "" if speed is None else f"{speed:.1f}/s"
