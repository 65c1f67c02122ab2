"""Signals that ask a run to stop: Ctrl-C and SIGTERM."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Work was stopped by a signal.

    Args:
        number: The signal's number.
        text: What was saved before it stopped, for people; empty if nothing was.
    """

    def __init__(self, number: int, text: str = "") -> None:
        """See the class."""
        super().__init__(text)
        self.number, self.text = number, text


def raise_on_sigterm() -> Any:
    """Make SIGTERM raise :class:`Interrupted`, as Ctrl-C does ``KeyboardInterrupt``.

    Returns:
        The handler before, for ``signal.signal``; None outside the main thread, where nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, _raise)


def leave_signals_to_parent(*_: Any) -> None:
    """In a process that loads data: Ctrl-C is its parent's, which ends it by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stop:
    """Inside its ``with`` block the first Ctrl-C or SIGTERM is only noted; a second one acts at once.

    Outside the main thread, or where ``watch`` is False, signals do what they did.

    Args:
        watch: Whether to note signals at all.

    Attributes:
        number: The number of the signal that was noted; None before.
    """

    def __init__(self, *, watch: bool = True) -> None:
        """See the class."""
        self.number: int | None = None
        self._watch = watch and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Begin to watch."""
        if self._watch:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        # a handler may interrupt any print, so it must not print itself
        os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: it was not installed from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
