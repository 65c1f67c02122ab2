"""``python -m fastlora.bench.gpu_check``: check a card, and print what was found."""

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fastlora.bench.gpu_check.run import (
    BUDGET_SECONDS,
    LEAST_BUDGET_SECONDS,
    STEPS,
    GpuCheck,
    NothingToCheckError,
)
from fastlora.bench.gpu_check.summary import summary

# what makes the page
_PAGE_NEEDS = ("matplotlib", "PIL", "jinja2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the card: 0 where all was done and right, 1 where not, 2 where there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.bench.gpu_check",
        description="Check every kernel on this machine's GPU against float64, time LoRA layers and training "
        "steps beside eager PyTorch, PEFT and torch.compile, and hold predictions against what was measured. "
        "Needs torch and Triton alone. The results file is written anew after all that is found.",
        epilog="example: python -m fastlora.bench.gpu_check --output results --budget 400",
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder (default: gpu-check)")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_SECONDS,
        help=f"seconds, {LEAST_BUDGET_SECONDS:.0f} at least (default: {BUDGET_SECONDS:.0f})",
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="steps (default: all)")
    given = parser.parse_args(arguments)
    if not LEAST_BUDGET_SECONDS <= given.budget < math.inf:
        parser.error(
            f"expected a --budget of {LEAST_BUDGET_SECONDS:.0f} seconds at least, got {given.budget:g}"
        )
    return check(GpuCheck(given.output, given.budget), given.only)


def check(gpu: GpuCheck, only: Sequence[str]) -> int:
    """Run the steps of these names, print what they found and make the page; returns the exit code."""
    try:
        path = gpu.run([step for step in STEPS if step.name in only])
    except NothingToCheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(summary(path)))
    print(_page(path))
    return 0 if gpu.passed else 1


def _page(path: Path) -> str:
    absent = [name for name in _PAGE_NEEDS if find_spec(name) is None]
    if absent:
        return f"no page: {', '.join(absent)} not installed; elsewhere: fastlora bench report {path}"
    from fastlora.bench.page import write_report

    try:
        return f"page: {write_report(path)[0]}"
    except ValueError as error:
        return f"no page: {error}"


if __name__ == "__main__":
    sys.exit(main())
