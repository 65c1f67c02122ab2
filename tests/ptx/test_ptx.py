"""Every kernel as Triton compiled it for sm_80 and sm_90, executed on the CPU; ``executor.h`` says how."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

import triton

from fastlora_kernels.choose.plan import KERNELS
from tests.cases import cases
from tests.ptx import counters, executed
from tests.ptx.faults import KINDS
from tests.ptx.trials import TRIALS, said_of, trial_name

ROOT = Path(__file__).parents[2]
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
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``executed.py`` tells of a suite."""
    # absent where pytest's cache is switched off
    kept = getattr(request.config, "cache", None)
    cache = kept.mkdir("ptx") if kept else tmp_path_factory.mktemp("ptx")
    command = ["-m", "tests.ptx.executed", "--suite", request.param, "--cache", str(cache)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"suite": request.param}


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
    wanted = {kernel.name for kernel in KERNELS}
    wanted |= {f"{kernel.name} persistent" for kernel in KERNELS if kernel.persistent}
    assert {*TRIALS} == wanted
    tried = {trial_name(spec) for target in counters.TARGETS for spec in executed.specs_of(target)}
    assert tried == wanted
