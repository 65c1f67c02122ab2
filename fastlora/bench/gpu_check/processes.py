"""The processes of a step: read while they write, begun again after a crash, stopped in the end."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora._core.backend import untuned_environment
from fastlora.bench.gpu_check.items import Found

# of one share of a step: a kernel that ends its process is told once, and not forty times
MOST_CRASHES = 5
_POLL_SECONDS = 0.1
# so long before its end a process begins nothing new
_LAST_ITEM_SECONDS = 10.0


@dataclass
class Share:
    """One process's part of a step, through however many processes it takes.

    Attributes:
        command: Starts a process of the step.
        number: Number of the share.
        of: How many there are.
        folder: Where the process writes.
        ends_at: Time of ``time.monotonic`` at which it is stopped.
        begun: How many of its items were begun.
        crashes: How many of its processes crashed.
        current: Name of the item that was begun last by the process that runs.
        ahead: Names of the items that were not begun.
        ended: Whether a process has come to the end of the share.
    """

    command: Sequence[str]
    number: int
    of: int
    folder: Path
    ends_at: float
    begun: int = 0
    crashes: int = 0
    current: str | None = None
    ahead: list[str] = field(default_factory=list)
    ended: bool = False
    _read: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def poll(self) -> tuple[bool, list[Found]]:
        """Whether the share is done, and what was found since it was asked last."""
        if self._process is None:
            self._start()
            return False, []
        code = self._process.poll()
        if code is None and time.monotonic() >= self.ends_at:
            self.stop()
            return True, [*self._new(), self._failed("stopped: its time was over"), *self._late()]
        found = list(self._new())
        if code is None or (code == 0 and self.ended):
            return code == 0, found
        found.append(self._failed(f"its process ended with {_ending(code)}: {self._last_words()}"))
        self.crashes += 1
        # without an item to leave out, it would end in the same way
        again = self.current is not None and self.crashes < MOST_CRASHES
        self._process, self.current = None, None
        return not again, found if again else [*found, *self._late()]

    def stop(self) -> None:
        """End the process and what it started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def _lines(self) -> Path:
        return self.folder / f"{self.number}.jsonl"

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.number}.log"

    def _start(self) -> None:
        seconds = max(0.0, self.ends_at - time.monotonic() - _LAST_ITEM_SECONDS)
        options = {"output": self._lines, "seconds": seconds, "share": self.number, "of": self.of}
        command = [*self.command, *(f"--{name}={value}" for name, value in options.items())]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, f"--skip={self.begun}"],
                # what was measured before would change what is checked
                env=untuned_environment(self.folder / "untuned"),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _new(self) -> Iterator[Found]:
        if not self._lines.exists():
            return
        with self._lines.open("rb") as file:
            file.seek(self._read)
            for line in file:
                # the end of a line that is being written comes later
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                found: dict[str, Any] = json.loads(line)
                if "items" in found:
                    self.ahead = found["items"]
                elif "end" in found:
                    self.ended = True
                elif "begin" in found:
                    self.begun, self.current = self.begun + 1, self.ahead.pop(0)
                else:
                    if "late" in found:
                        self.ahead.pop(0)
                    yield found

    def _late(self) -> Iterator[Found]:
        return ({"late": name} for name in self.ahead)

    def _failed(self, why: str) -> Found:
        return {"failed": {"case": self.current or "before the first item", "error": why}}

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


def follow(
    command: Sequence[str], shares: int, folder: Path, ends_at: float, take: Callable[[Sequence[Found]], None]
) -> None:
    """Run a step in processes of its own until all are done or its time is over.

    Args:
        command: Starts a process of the step.
        shares: How many processes share its items.
        folder: An empty one, for what they write.
        ends_at: Time of ``time.monotonic`` at which they are stopped.
        take: Called with what they have found since it was called last.
    """
    running = [Share(command, number, shares, folder, ends_at) for number in range(shares)]
    try:
        while running:
            for share in list(running):
                done, found = share.poll()
                if found:
                    take(found)
                if done:
                    running.remove(share)
            time.sleep(_POLL_SECONDS)
    finally:
        for share in running:
            share.stop()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name
