"""Candidates that compute what the eager formula does: nothing else is timed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from fastlora.bench.candidates import Candidates
from fastlora.bench.cases import Case
from fastlora.bench.turns import Step, check_equal

# these compute something else: bounds, not candidates
BOUNDS = ("frozen", "products")


def checked(
    steps: dict[str, Step], tolerance: float, *, expected: str = "reference"
) -> tuple[dict[str, Step], dict[str, str]]:
    """The candidates that compute what ``expected`` does, and why others are left out.

    Raises:
        RuntimeError: A candidate computes something else.
    """
    right, left_out = steps[expected](), dict[str, str]()
    for name in [name for name in steps if name not in (*BOUNDS, expected)]:
        try:
            got = steps[name]()
        except Exception as error:
            # a machine without a C++ compiler, a graph the compiler does not take: the others still count
            if "compiled" not in name:
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        check_equal(name, got, right, tolerance)
    return without(steps, left_out), left_out


def checked_candidates(
    case: Case, make: Callable[[Case], Candidates], tolerance: float
) -> tuple[Candidates, dict[str, str]]:
    """A case's candidates, checked without dropout: with it, each draws a mask of its own."""
    made = make(case.without_dropout())
    right, left_out = checked(made.steps, tolerance)
    if case.dropout:
        made = make(case)
        right = without(made.steps, left_out)
    return replace(made, steps=right), left_out | dict(made.absent)


def without(steps: Mapping[str, Step], left_out: Iterable[str]) -> dict[str, Step]:
    """The candidates but for some."""
    return {name: step for name, step in steps.items() if name not in left_out}
