"""LoRA layers, forward and forward + backward, against the frozen layer alone and others' layers."""

from typing import Any

import pytest

from benchmarks.marks import parameters
from benchmarks.measuring import time_in_turns
from benchmarks.shapes import layer_cases
from fastlora.bench.candidates import TOLERANCE, lora_candidates
from fastlora.bench.cases import Case, layer_work
from fastlora.bench.checked import checked_candidates
from fastlora.bench.results_file import Record


@pytest.mark.parametrize("case", parameters(layer_cases()))
def bench_layer(case: Case, benchmark: Any, record: Record) -> None:
    """One row."""
    made, left_out = checked_candidates(case, lora_candidates, TOLERANCE[case.dtype])
    timed = time_in_turns(benchmark, case, made.steps, rounds=9 if case.device == "cpu" else 30)
    record(case, timed, left_out=left_out, **layer_work(case))
