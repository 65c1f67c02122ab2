"""Bytes of LoRA layers: what forward leaves for backward, and the most that a step holds."""

from typing import Any

import pytest

from benchmarks.marks import parameters
from benchmarks.measuring import memory
from benchmarks.shapes import memory_cases
from fastlora.bench.candidates import TOLERANCE, lora_candidates
from fastlora.bench.cases import Case
from fastlora.bench.checked import checked_candidates
from fastlora.bench.results_file import Record


@pytest.mark.parametrize("case", parameters(memory_cases()))
def bench_memory(case: Case, benchmark: Any, record: Record) -> None:
    """One row, without times."""
    made, left_out = checked_candidates(case, lora_candidates, TOLERANCE[case.dtype])
    for step in made.steps.values():
        # the first run compiles and fills caches
        step()
    counted = benchmark.pedantic(memory, args=(case, made.steps, made.given), rounds=1)
    record(case, counted, left_out=left_out)
