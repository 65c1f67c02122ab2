"""Rehearse one target: ``python -m tests.launch.run --target sm_90 --suite full --cache FOLDER``.

A process of its own, because Triton's interpreter, which the other tests run in, and its compiler can't share
one. The last line is a JSON object.
"""

import argparse
import contextlib
import gc
import json
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fastlora.ops.prepared import Memory
from tests.launch.calls import Case, lora
from tests.launch.cards import CARDS
from tests.launch.launched import SUITES, few
from tests.launch.library import Library
from tests.launch.refusals import refusals
from tests.launch.stage import Stage

# batch sizes, half of them multiples of 16
_BATCHES = 40


class Rehearsal:
    """Runs cases and keeps what was learnt.

    Attributes:
        failures: What went wrong, by the case's name.
        launched: Names of the kernels, by the case's name.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.library = stage, Library()
        self.failures, self.launched = dict[str, str](), dict[str, list[str]]()

    def run(self, case: Case) -> None:
        """Forward and backward, on what other cases have prepared, anew, and again; errors are failures."""
        assert case.name not in self.launched, f"two cases are called {case.name!r}"
        try:
            after_others = self._launches(case)
            with _nothing_prepared():
                anew = self._launches(case)
                again = self._launches(case)
            assert after_others == anew, "something was launched that was prepared for another call"
            assert again == anew, "the second call launches otherwise than the first"
        except Exception as error:
            self.failures[case.name] = _said(error)
        self.launched[case.name] = [name for name, *_ in self.stage.launches]

    def _launches(self, case: Case) -> list[Any]:
        self.stage.launches.clear()
        with self.library:
            backward = case.work()
            if backward is not None:
                backward()
        return list(self.stage.launches)

    def compilations(self, calls: list[Callable[[], Any]]) -> int:
        """How many kernels a series of calls has compiled."""
        self.stage.compiled.clear()
        with self.library:
            for call in calls:
                call()()
        return len(self.stage.compiled)


@contextlib.contextmanager
def _nothing_prepared() -> Iterator[None]:
    """Everything is found out anew meanwhile; after that what was prepared for other calls is there again."""
    before = [dict(memory) for memory in Memory._all]
    Memory.forget_all()
    try:
        yield
    finally:
        for memory, prepared in zip(Memory._all, before, strict=True):
            memory.update(prepared)


def recompilations(rehearsal: Rehearsal) -> dict[str, int]:
    """Kernels compiled in two passes over batch sizes that differ, and for other dropouts."""
    draw = random.Random(0)
    rows = [draw.randint(1, 4096) for _ in range(_BATCHES // 2)]
    rows += [16 * draw.randint(1, 256) for _ in range(_BATCHES // 2)]

    def series(rows: list[int]) -> int:
        return rehearsal.compilations([lora(m, 1024, 1024, p=0.1) for m in rows])

    return {
        "first pass": series(rows),
        "second pass": series([m + 16 * draw.randint(1, 4) for m in rows]),
        "other dropouts": rehearsal.compilations([lora(rows[0], 1024, 1024, p=p) for p in (0.05, 0.2, 0.5)]),
    }


def kept(rehearsal: Rehearsal) -> int:
    """How many of a call's tensors are still there after it: what is prepared must hold none."""
    rehearsal.stage.seen.clear()
    rehearsal.run(Case("a call whose tensors are let go", lora(8192, 4096, 4096, p=0.1)))
    gc.collect()
    return sum(tensor() is not None for tensor in rehearsal.stage.seen)


def rehearse(target: str, suite: str, cache: Path) -> dict[str, Any]:
    """Everything for one target.

    Args:
        target: One of ``CARDS``.
        suite: ``few``, ``quick`` or ``full``.
        cache: Folder that keeps compiled kernels.

    Returns:
        How many tensors were kept, what failed, what the host waited for, kernels by case, compilations,
        what the stage refused.
    """
    stage = Stage(target, cache)
    stage.install()
    rehearsal = Rehearsal(stage)
    compiled = recompilations(rehearsal)
    for case in few() if suite == "few" else chain.from_iterable(cases() for cases in SUITES):
        if case.quick or suite == "full":
            rehearsal.run(case)
    call = lora(256, 640, 640, p=0.1, backend="triton")
    rehearsal.run(Case("a stream", call))
    stage.stream += 0x100
    rehearsal.run(Case("another stream", call))
    return {
        "kept": kept(rehearsal),
        "failures": rehearsal.failures,
        "waits": rehearsal.library.waits,
        "launched": rehearsal.launched,
        "compilations": compiled,
        "refusals": refusals(stage),
    }


def _said(error: BaseException) -> str:
    """What an exception says, and the last line of the project on the way there."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "fastlora" in frame.filename]
    where = f" [{Path(places[-1].filename).name}:{places[-1].lineno}]" if places else ""
    return f"{type(error).__name__}: {str(error)[-500:]}{where}"


def main() -> None:
    """Print what was learnt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=CARDS, default="sm_90")
    parser.add_argument("--suite", choices=("few", "quick", "full"), default="quick")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps compiled kernels")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    json.dump(rehearse(arguments.target, arguments.suite, arguments.cache), sys.stdout)


if __name__ == "__main__":
    main()
