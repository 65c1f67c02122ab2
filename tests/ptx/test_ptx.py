"""Every kernel as Triton compiled it for sm_80 and sm_90, executed on the CPU; ``executor.h`` says how."""

import shutil
import sys
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

import triton

from fastlora_kernels.choose.plan import KERNELS
from fastlora_kernels.compile.specs import DTYPES
from fastlora_kernels.kernel import Kernel
from tests.cases import cases
from tests.compiling import told_by
from tests.ptx import counters, executed
from tests.ptx.faults import KINDS
from tests.ptx.trials import TRIALS, said_of, trial_name

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux",
    reason="the executor is built with gcc on Linux",
)
# what an architecture doesn't have
NOT_PLANTED = {
    "quick": set(),
    "sm_80 full": {
        "an operand of wgmma turned", "a wait for wgmma one group late", "half the bytes expected",
        "an mbarrier never made", "no fence before a TMA store",
    },
    "sm_90 full": {"operands of a product swapped"},
}  # fmt: skip


@pytest.fixture(scope="module", params=cases(["quick"], [*NOT_PLANTED][1:]))
def told(request: pytest.FixtureRequest, kept_folder: Callable[[str], Path]) -> dict[str, Any]:
    """What ``executed.py`` tells of a suite."""
    cache = str(kept_folder("ptx"))
    return {
        **told_by("tests.ptx.executed", "--suite", request.param, "--cache", cache),
        "suite": request.param,
    }


def test_compiled_kernels_are_right(told: dict[str, Any]) -> None:
    assert told["failures"] == {}


def test_every_spec_is_tried(told: dict[str, Any]) -> None:
    assert {said_of(spec) for spec in executed.specs_of(told["suite"])} <= {*told["tried"]}


def test_planted_faults_are_noticed(told: dict[str, Any]) -> None:
    missed = {
        (kernel, kind): noticed
        for kernel, kinds in told["faults"].items()
        for kind, noticed in kinds.items()
        if not all(noticed)
    }
    assert missed == {}


def test_every_kind_of_fault_is_planted(told: dict[str, Any]) -> None:
    planted = {kind for kinds in told["faults"].values() for kind in kinds}
    assert KINDS - planted == NOT_PLANTED[told["suite"]]


def test_no_counter_is_worse_than_the_committed_one(told: dict[str, Any]) -> None:
    """A new table is a decision: ``python -m tests.ptx.counters`` writes ``compile/counters.csv``."""
    made_with, before = counters.committed()
    assert before
    if made_with != triton.__version__:
        pytest.skip(f"the committed counters are Triton {made_with}'s, not {triton.__version__}'s")
    assert counters.worse_than_committed(told["counters"]) == []


def test_every_kernel_has_a_trial() -> None:
    """Its record makes the cases: each dtype, with dropout and without."""
    persistent = {f"{kernel.name} persistent" for kernel in KERNELS if kernel.persistent}
    assert {*TRIALS} == {kernel.name for kernel in KERNELS} | persistent
    wanted = {
        (kernel.name, dtype, dropout)
        for kernel, dtype in product(KERNELS, DTYPES)
        for dropout in ((False, True) if "HAS_DROPOUT" in kernel.varies else (False,))
    }
    for target in counters.TARGETS:
        specs = executed.specs_of(f"{target} full")
        assert {(spec.kernel, spec.dtype, spec.dropout) for spec in specs} == wanted
        # sm_80 has no tensor descriptors
        assert persistent - {trial_name(spec) for spec in specs} == (
            persistent if target == "sm_80" else set()
        )


@pytest.mark.parametrize("target", counters.TARGETS)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kind_of_call_has_a_trial(kernel: Kernel, target: str) -> None:
    """Adapters in both dtypes, each argument that may be absent, ranks that 16 divides and others."""
    mine = [spec for spec in executed.specs_of(f"{target} full") if spec.kernel == kernel.name]
    assert {flag for spec in mine for flag in spec.absent} == {*chain(*kernel.optional)}
    assert {spec.adapter_dtype for spec in mine} == {"fp32", *(["bf16"] if kernel.has_parameters else [])}
    assert any(spec.aligned > spec.rank_aligned for spec in mine) == ("rank" in kernel.axes)


def test_the_committed_counters_are_of_every_kernel() -> None:
    specs = [spec for target in counters.TARGETS for spec in counters.counted_specs(target)]
    assert {spec.kernel for spec in specs} == {kernel.name for kernel in KERNELS}
    committed = {tuple(row[name] for name in counters.SPEC_KEY) for row in counters.committed()[1]}
    assert committed == {tuple(counters.key_of(spec).values()) for spec in specs}


@pytest.mark.parametrize("figure", ["instructions", "barrier", "shuffle", "sectors", "waves"])
def test_the_gate_notices(figure: str) -> None:
    row = counters.committed()[1][0]
    assert counters.worse_than_committed([row]) == []
    (line,) = counters.worse_than_committed([{**row, figure: str(float(row[figure]) + 0.01)}])
    assert f"{figure} " in line
    (line,) = counters.worse_than_committed([{**row, "warps": "16"}])
    assert "is not in counters.csv" in line
