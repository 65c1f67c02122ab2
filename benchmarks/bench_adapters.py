"""Bottleneck adapters, forward + backward, against the eager module and the six matrix products alone."""

from typing import Any

import pytest

from benchmarks.marks import parameters
from benchmarks.measuring import memory, time_in_turns
from benchmarks.shapes import adapter_cases, adapter_flops
from fastlora.bench.candidates import TOLERANCE, adapter_candidates
from fastlora.bench.cases import Case
from fastlora.bench.checked import checked_candidates
from fastlora.bench.results_file import Record


@pytest.mark.parametrize("case", parameters(adapter_cases()))
def bench_adapter(case: Case, benchmark: Any, record: Record) -> None:
    """One row."""
    made, left_out = checked_candidates(case, adapter_candidates, TOLERANCE[case.dtype])
    timed = time_in_turns(benchmark, case, made.steps, rounds=9 if case.device == "cpu" else 30)
    counted = memory(case, made.steps, made.given)
    record(case, timed | counted, left_out=left_out, flops=adapter_flops(case))
