"""The benchmark suite as pytest runs it: tiny cases through the real machinery, and the file they end in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the suite compares with PEFT")
pytest.importorskip("pytest_benchmark", reason="the suite runs in pytest-benchmark")

from benchmarks.shapes import adapter_cases, layer_cases, memory_cases, step_cases, tune_shapes
from fastlora.bench.results import load_results

ROOT = Path(__file__).parents[1]
# the same functions as the suite's, on cases that take no time; one of them computes something else
TINY = """
import pytest
from fastlora.bench import candidates
from benchmarks.bench_adapters import bench_adapter as adapter
from benchmarks.bench_layers import bench_layer as layer
from benchmarks.bench_memory import bench_memory as memory
from benchmarks.marks import parameters
from fastlora.bench.cases import Case

TINY = dict(k=16, n=16, rank=4, dtype="fp32", threads=1)
LAYER = Case("layers", "tiny", 8, dropout=0.1, **TINY)
GPU = Case("layers", "tiny", 8, 16, 16)

@pytest.mark.parametrize("case", parameters([LAYER, GPU]))
def bench_layer(case, benchmark, record):
    layer(case, benchmark, record)

# twice as large as what fastlora leaves to the eager formula
WIDE = Case("adapters", "wide", 1024, 512, 512, 64, dtype="fp32", threads=1)
@pytest.mark.parametrize("case", parameters([WIDE]))
def bench_adapter(case, benchmark, record):
    adapter(case, benchmark, record)

@pytest.mark.parametrize("case", parameters([Case("memory", "tiny", 8, dropout=0.1, busy=1, **TINY)]))
def bench_memory(case, benchmark, record):
    memory(case, benchmark, record)

@pytest.mark.parametrize("case", parameters([LAYER]))
def bench_wrong(case, benchmark, record, monkeypatch):
    right = candidates.LibrarySplit.forward
    monkeypatch.setattr(candidates.LibrarySplit, "forward", lambda self, x: 1.01 * right(self, x))
    layer(case, benchmark, record)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run of the tiny cases says, and its results file."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "bench_tiny.py").write_text(TINY)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-c", str(ROOT / "benchmarks" / "pytest.ini")]
    command += ["-p", "benchmarks.conftest", str(folder), "--results", str(folder / "results")]
    command += ["-m", "not gpu", "--beside", "a test"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (path,) = (folder / "results").glob("*.json")
    return done.stdout + done.stderr, path


@pytest.mark.full
def test_rows(ran: tuple[str, Path]) -> None:
    results = load_results(ran[1])
    assert results.kind == "cpu"
    assert results.environment["beside"] == "a test"
    layer, adapter, memory = results.rows
    rivals = {"reference", "peft", "addmm", "fastlora"}
    assert layer.median_ms.keys() == layer.spread_ms.keys() == rivals | {"frozen"}
    assert adapter.median_ms.keys() == {"products", "reference", "fastlora"}
    assert memory.kept_bytes.keys() == memory.peak_bytes.keys() == rivals
    assert layer.flops == 2 * 8 * (16 * 16 + 2 * 16 * 4) + 2 * 8 * (16 * 16 + 4 * 16 * 4)


@pytest.mark.full
def test_kept_bytes_are_those_of_the_formulas(ran: tuple[str, Path]) -> None:
    _, adapter, memory = load_results(ran[1]).rows
    # z before the activation, and in the eager formula after it too
    assert adapter.kept_bytes == {"reference": 2 * 1024 * 64 * 4, "fastlora": 1024 * 64 * 4}
    # the hand-written split keeps the dropped copy of x, and torch its mask, on a CPU in x's dtype
    assert memory.kept_bytes["addmm"] == 2 * 8 * 16 * 4
    # S, and a mask of at most a byte an element
    assert memory.kept_bytes["fastlora"] <= 8 * 4 * 4 + 8 * 16
    assert all(memory.peak_bytes[name] >= memory.kept_bytes[name] for name in memory.kept_bytes)


@pytest.mark.full
def test_a_case_that_fails_leaves_the_others(ran: tuple[str, Path]) -> None:
    output, path = ran
    assert "1 failed, 3 passed" in output
    content = json.loads(path.read_text())
    assert content["complete"] is False
    (failure,) = content["failed"]
    assert "addmm: result 0 differs from the reference by" in failure["error"]


@pytest.mark.full
def test_results_are_named_for_the_device_and_the_day(ran: tuple[str, Path]) -> None:
    content = json.loads(ran[1].read_text())
    assert ran[1].stem.endswith(content["environment"]["date"])
    assert ran[1].stem == ran[1].stem.lower()
    assert f"results: {ran[1]}" in ran[0]
    assert (ran[1].with_suffix("") / "report.html").exists()


def test_every_case_has_an_id_of_its_own() -> None:
    for cases in (layer_cases(), memory_cases(), adapter_cases(), step_cases()):
        ids = [case.id for case in cases]
        assert len(set(ids)) == len(ids)


def test_the_layers_that_are_timed_on_a_gpu_are_tuned() -> None:
    path = ROOT / "benchmarks" / "shapes.json"
    assert path.read_text() == tune_shapes(), "run python -m benchmarks.shapes"
    calls = {(c["rows"], c["inputs"], c["outputs"], c["dropout"]) for c in json.loads(path.read_text())}
    timed = {(c.m, c.k, c.n, c.dropout) for c in layer_cases() if c.device == "cuda"}
    assert calls == timed
