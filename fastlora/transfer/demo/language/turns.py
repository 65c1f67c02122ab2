"""Trainings that take turns, a step each, so that whatever else the machine does falls on all alike."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class _Stopped(RuntimeError):
    """Another training has stopped before its end."""


class Turns:
    """Whose step is next.

    Args:
        count: Number of trainings, each in a thread of its own; all have the same number of steps.
    """

    def __init__(self, count: int) -> None:
        """See the class."""
        self._count, self._whose, self._stopped = count, 0, False
        self._changed = threading.Condition()

    def take(self, number: int) -> None:
        """Wait for the turn of a training, counted from 0.

        Raises:
            RuntimeError: Another training has stopped before its end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._whose == number)
            if self._stopped:
                raise _Stopped("another training has stopped before its end")

    def give(self) -> None:
        """Leave the turn to the next training."""
        with self._changed:
            self._whose = (self._whose + 1) % self._count
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def train_in_turns(turns: Turns, trainings: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the trainings return; one that fails, or Ctrl-C, stops all.

    Args:
        turns: What they take and give; each knows its own number.
        trainings: The first runs in the calling thread.
    """

    def run(training: Callable[[], Any]) -> Any:
        try:
            return training()
        except BaseException:
            turns.stop()
            raise

    with ThreadPoolExecutor(len(trainings)) as pool:
        others = [pool.submit(run, training) for training in trainings[1:]]
        try:
            return [run(trainings[0]), *(other.result() for other in others)]
        except _Stopped as stopped:
            # the error that stopped the rest is the one to tell
            errors = [error for other in others if (error := other.exception()) is not None]
            raise next((error for error in errors if not isinstance(error, _Stopped)), stopped) from None
