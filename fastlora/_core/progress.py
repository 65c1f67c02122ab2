"""Whom long work tells how it gets on."""

from typing import Protocol


class Reporter(Protocol):
    """Where a run tells how it gets on."""

    def note(self, text: str) -> None:
        """Say something once."""

    def advance(
        self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        """Say that ``done`` of ``total`` units of a task are done, with the last loss and the peak bytes."""
