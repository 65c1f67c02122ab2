"""The whole check: one step after another, each in its part of the time, all that is found kept at once."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.bench.gpu_check.items import Found
from fastlora.bench.gpu_check.processes import follow
from fastlora.bench.results_file import ResultsFile, slug

BUDGET_SECONDS = 400.0
# with less, no step is left the time to begin much
LEAST_BUDGET_SECONDS = 120.0
# importing torch anew takes most of it
_PREFLIGHT_SECONDS = 60.0
CHILD = (sys.executable, "-m", "fastlora.bench.gpu_check.child")


@dataclass(frozen=True)
class Step:
    """A step of the check.

    Attributes:
        name: As ``child`` knows it.
        title: For people.
        until: Share of what the first look leaves of the budget, after which it ends; what a step leaves is
            the next one's.
        shared: Whether several processes work at once, which times would suffer from.
    """

    name: str
    title: str
    until: float
    shared: bool = False


STEPS = (
    Step("exactness", "every kernel and path against float64", 0.45, shared=True),
    Step("layers", "LoRA layers, timed", 0.8),
    Step("training", "training steps, timed", 0.98),
)


class NothingToCheckError(RuntimeError):
    """There is no card, or no kernel can be launched on it; the message says what was expected."""


class GpuCheck:
    """A check of this machine's first visible GPU.

    Args:
        folder: Where the results file goes.
        budget: Seconds that all steps may take.
        tell: Called with lines for people.
        child: Starts a process of a step; the step's name follows.
        note: What else the file's reader has to know, or None.
    """

    def __init__(
        self,
        folder: Path,
        budget: float = BUDGET_SECONDS,
        *,
        tell: Callable[[str], None] = print,
        child: Sequence[str] = CHILD,
        note: str | None = None,
    ) -> None:
        """See the class."""
        self._folder, self._budget, self._tell = folder, budget, tell
        self._child, self._note = child, note
        self._exactness: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._late: list[str] = []
        self._left_out: list[dict[str, str]] = []
        self._profiles: list[dict[str, Any]] = []
        self._failures = 0
        # outcomes and rows
        self._found = 0

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """What the card computes wrongly."""
        return [each for each in self._exactness if not each["right"]]

    @property
    def passed(self) -> bool:
        """Whether anything was done, all of it, and right."""
        return bool(self._steps) and not (self.wrong or self._failures or self._late)

    def run(self, steps: Sequence[Step] = STEPS) -> Path:
        """Take the steps in turn.

        Args:
            steps: Which; all by default.

        Returns:
            The results file, written anew after all that was found.

        Raises:
            NothingToCheckError: There is no card that kernels can be launched on.
        """
        ends_at = time.monotonic() + self._budget
        here, failed = self._preflight()
        looked = time.monotonic()
        name = f"gpu-check-{slug(here['device'])}-{time.strftime('%Y-%m-%d-%H%M')}.json"
        environment = here["environment"] | ({"note": self._note} if self._note else {})
        self._file = ResultsFile(self._folder / name, "gpu", here["device"], environment)
        self._file.put(budget_seconds=self._budget, exactness=self._exactness, steps=self._steps)
        self._tell(f"{here['device']}: results in {self._file.path}")
        self._take(failed)
        for step in steps:
            began, before = time.monotonic(), self._found
            processes = here["processes"] if step.shared else 1
            self._follow(step.name, processes, looked + step.until * (ends_at - looked), self._take)
            if self._found == before:
                self._take([{"failed": {"case": step.title, "error": "nothing was checked"}}])
            seconds = round(time.monotonic() - began, 1)
            self._steps.append({"step": step.name, "seconds": seconds})
            self._file.put(steps=self._steps)
            self._tell(f"{step.title}: {seconds:.0f} s")
        self._file.finish(complete=self.passed)
        return self._file.path

    def _preflight(self) -> tuple[dict[str, Any], list[Found]]:
        found: dict[str, Any] = {}
        failed: list[Found] = []

        def take(news: Sequence[Found]) -> None:
            for each in news:
                found.update(each.get("preflight", {}))
                failed.extend([each] if "failed" in each else [])

        self._follow("preflight", 1, time.monotonic() + _PREFLIGHT_SECONDS, take)
        if "problem" in found:
            raise NothingToCheckError(found["problem"])
        if not found:
            why = "; ".join(each["failed"]["error"] for each in failed) or "it did not begin in its time"
            raise NothingToCheckError(f"the first look at the device failed: {why}")
        return found, failed

    def _follow(
        self, step: str, shares: int, ends_at: float, take: Callable[[Sequence[Found]], None]
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="fastlora-gpu-check-") as folder:
            follow([*self._child, step], shares, Path(folder), ends_at, take)

    def _take(self, news: Sequence[Found]) -> None:
        for found in news:
            self._found += "row" in found or "outcome" in found
            if "row" in found:
                self._file.add(found["row"])
            elif "failed" in found:
                self._failures += 1
                self._file.add_failure(**found["failed"])
            elif "outcome" in found:
                self._exactness.append(found["outcome"])
            elif "profile" in found:
                self._profiles.append(found["profile"])
            elif "left_out" in found:
                self._left_out.append(found["left_out"])
            elif "late" in found:
                self._late.append(found["late"])
        told = {"late": self._late, "left_out": self._left_out, "profiles": self._profiles}
        self._file.put(exactness=self._exactness, **told)
