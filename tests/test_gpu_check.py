"""``python -m fastlora.bench.gpu_check``: nothing that was found is lost, and wrong results are told."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the check is of the kernels")

from fastlora.bench.gpu_check import child, exactness, other_ops, processes
from fastlora.bench.gpu_check.__main__ import check
from fastlora.bench.gpu_check.comparing import equality, outcome
from fastlora.bench.gpu_check.interpreted_mask import mask_by_interpreter
from fastlora.bench.gpu_check.items import Item, work_through
from fastlora.bench.gpu_check.run import STEPS, GpuCheck, NothingToCheckError
from fastlora.bench.gpu_check.summary import summary
from fastlora.ops import lora_triton
from fastlora.ops.prepared import Memory
from fastlora.tuning.calls import LayerCall
from fastlora_kernels.lora.forward import lora_forward
from tests.cases import full
from tests.tuning_models import CALL, device, pretend

ROOT = Path(__file__).parents[1]
PROCESS = (sys.executable, str(ROOT / "tests" / "gpu_check_process.py"))
# what GPU images lack
OPTIONAL = """
accelerate jinja2 matplotlib packaging peft PIL platformdirs pytest rich safetensors timm tomli_w torchvision
transformers typer
"""
# finds what is installed but for these
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] in {OPTIONAL.split()} else super().find_spec(name, *rest)
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], GpuCheck, Path, float]:
    """What a check has found one of whose processes crashes while another hangs, and the seconds it took."""
    gpu = GpuCheck(tmp_path_factory.mktemp("check"), budget=10.0, child=PROCESS, tell=lambda line: None)
    began = time.monotonic()
    path = gpu.run()
    return json.loads(path.read_text()), gpu, path, time.monotonic() - began


def test_a_crash_loses_only_its_item(ran: tuple[dict[str, Any], GpuCheck, Path, float]) -> None:
    found = {each["what"] for each in ran[0]["exactness"]}
    assert found == {"first", "other", "before the crash", "a tile", "after it"}
    crash = ran[0]["failed"][0]
    assert crash["case"] == "crashing"
    assert "SIGSEGV: an illegal address, say" in crash["error"]


def test_a_step_ends_when_its_time_is_over(ran: tuple[dict[str, Any], GpuCheck, Path, float]) -> None:
    content, *_, seconds = ran
    assert content["failed"][1] == {"case": "slow", "error": "stopped: its time was over"}
    assert content["late"] == ["behind it"]
    assert [step["step"] for step in content["steps"]] == [step.name for step in STEPS]
    assert [row["suite"] for row in content["rows"]] == ["eager", "graphs", "steps"]
    # the layers' end, 80 % of the budget, and what the last step takes
    assert seconds >= 8.0
    assert content["steps"][1]["seconds"] < 10.0


def test_what_crashes_too_often_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MOST_CRASHES", 1)
    found: list[Any] = []
    processes.follow([*PROCESS, "exactness"], 2, tmp_path, time.monotonic() + 60, found.extend)
    assert [each["failed"]["case"] for each in found if "failed" in each] == ["crashing"]
    assert [each["late"] for each in found if "late" in each] == ["after it"]


def test_it_does_not_pass(ran: tuple[dict[str, Any], GpuCheck, Path, float]) -> None:
    assert ran[0]["complete"] is False
    assert not ran[1].passed
    assert [each["what"] for each in ran[1].wrong] == ["a tile"]


def test_the_summary_and_the_page_tell_it(ran: tuple[dict[str, Any], GpuCheck, Path, float]) -> None:
    from fastlora.bench.page import write_report

    text = "\n".join(summary(ran[2]))
    assert "exactness: 4 right, 1 wrong" in text
    assert "wrong: a kernel: a tile" in text
    assert "largest error over eager's own: 1.25" in text
    graphs, eager = (line for line in text.splitlines() if line.startswith("a layer"))
    assert graphs.split()[-8:-2] == ["1,000.0", "2,000.0", "–", "–", "–", "1,500.0"]
    assert eager.split()[-2:] == ["1,200.0", "100.0"]
    page = write_report(ran[2])[0].read_text("utf-8")
    assert "4 comparisons came out right, 1 wrong" in page
    assert "a tile (errs by what is no number, eager by\n0.8)" in page
    assert "Predicted and measured" in page
    assert "1.25×" in page


def test_an_item_that_fails_leaves_the_others() -> None:
    def fails() -> Iterator[dict[str, Any]]:
        yield {"row": 1}
        raise ValueError("no such tile\nand more")

    found = list(work_through([Item("a", fails), Item("b", lambda: [{"row": 2}])], time.monotonic() + 60))
    failed = {"failed": {"case": "a", "error": "ValueError: no such tile"}}
    assert found == [{"begin": "a"}, {"row": 1}, failed, {"begin": "b"}, {"row": 2}]
    assert list(work_through([Item("a", fails)], time.monotonic() - 1)) == [{"late": "a"}]


def test_a_process_takes_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Item(name, lambda name=name: [{"row": name}]) for name in "abcdef"]  # type: ignore[misc]
    monkeypatch.setitem(child.STEPS, "layers", lambda device: items)
    path = tmp_path / "lines"
    assert child.main(["layers", f"--output={path}", "--share=1", "--of=2", "--skip=1"]) == 0
    told, *found = (json.loads(line) for line in path.read_text().splitlines())
    assert told == {"items": ["d", "f"]}
    assert found[1::2] == [{"row": "d"}, {"row": "f"}]


def test_without_a_card_and_optional_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "fastlora.bench.gpu_check", "--output", str(tmp_path / "out")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a CUDA or ROCm device"), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_first_look_that_crashes_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no driver')"]
    with pytest.raises(NothingToCheckError, match="exit code 1: no driver"):
        GpuCheck(tmp_path, child=command).run()
    assert check(GpuCheck(tmp_path, child=command), []) == 2


def test_what_is_allowed() -> None:
    exact = torch.randn(64, 64, dtype=torch.float64)
    eager = exact.bfloat16()
    assert outcome("c", "w", [eager], [eager], [exact], 64)["outcome"]["right"]
    off = (exact * (1 + 3 * torch.finfo(torch.bfloat16).eps)).bfloat16()
    wrong = outcome("c", "w", [eager, off], [eager, eager], [exact, exact], 64)["outcome"]
    assert not wrong["right"]
    assert wrong["error"] > wrong["allowed"] > wrong["eager_error"] > 0
    both = ([eager * float("nan"), eager], [eager, eager], [exact, exact])
    nothing = outcome("c", "w", *both, 64)["outcome"]
    assert not nothing["right"]
    # JSON has no NaN
    assert nothing["error"] is None
    # one rounding of a sum in float32 for each of its terms
    close = exact.float() * (1 + 20 * torch.finfo(torch.float32).eps)
    assert outcome("c", "w", [close], [exact.float()], [exact], 64)["outcome"]["right"]
    assert not outcome("c", "w", [close], [exact.float()], [exact], 8)["outcome"]["right"]
    assert equality("c", "w", eager, off)["outcome"]["right"] is False


@pytest.fixture
def card(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels compute, with the tiles of a small card where that is the interpreter."""
    if kernel_device.type == "cpu":
        pretend(monkeypatch)
    monkeypatch.setattr(exactness, "STRIDED", (33, 32, 48))
    monkeypatch.setattr(exactness, "MANY_ROWS", 40)
    return device()


def outcomes(found: Iterator[Any]) -> list[dict[str, Any]]:
    return [each["outcome"] for each in found]


def assert_right(found: list[dict[str, Any]], least: int) -> None:
    assert [each for each in found if not each["right"]] == []
    assert len(found) >= least


@pytest.mark.parametrize("part", ["forward", full("backward")])
def test_every_path_is_compared(part: Any, card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_right(outcomes(exactness.lora_paths(part, CALL, card)), least=4)

    def wrong(x: Tensor, *rest: Any, **more: Any) -> None:
        lora_forward(x * 1.05, *rest, **more)

    if part == "forward":
        monkeypatch.setattr(lora_triton, "lora_forward", wrong)
        Memory.forget_all()
        found = outcomes(exactness.lora_paths("forward", CALL, card))
        assert {each["what"].split()[0] for each in found if not each["right"]} == {"split"}


def test_masks_are_those_of_the_interpreter(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = LayerCall(20, 70, 16, 16, 0.5, "float16")
    with monkeypatch.context() as compiling:
        compiling.delenv("TRITON_INTERPRET", raising=False)
        drawn = mask_by_interpreter(call)
    monkeypatch.setattr(exactness, "mask_by_interpreter", lambda call: drawn)
    assert_right(outcomes(exactness.masks(call, card)), least=3)
    monkeypatch.setattr(exactness, "mask_by_interpreter", lambda call: drawn ^ 1)
    assert outcomes(exactness.masks(call, card))[0]["right"] is False


def test_strides_and_huge_outputs_are_compared(card: torch.device) -> None:
    assert_right(outcomes(exactness.strides(card)), least=12)
    assert_right(outcomes(exactness.huge(CALL, card)), least=2)


def test_replays_are_compared(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no graphs, calling stands for a replay; one that does nothing is told."""
    monkeypatch.setattr(exactness, "captured", lambda work, device: SimpleNamespace(replay=work))
    monkeypatch.setattr(torch, "compile", lambda layer, **options: layer)
    assert_right(outcomes(exactness.replays(0.0, card)), least=3)
    assert_right(outcomes(exactness.replays(0.5, card)), least=1)
    monkeypatch.setattr(exactness, "captured", lambda work, device: SimpleNamespace(replay=lambda: None))
    found = [*outcomes(exactness.replays(0.0, card)), *outcomes(exactness.replays(0.5, card))]
    assert {each["what"] for each in found if not each["right"]} == {"a replay", "another mask"}


def test_dora_and_adapters_are_compared(card: torch.device) -> None:
    sizes: Any = (33, 48, 32, 5, torch.float16, 0.25)
    assert_right(outcomes(other_ops.dora("DoRA", card, *sizes)), least=2)
    for residual in ("input", "tensor", None):
        adapter: Any = (33, 48, 16, torch.float16, 0.25, "gelu", residual)
        assert_right(outcomes(other_ops.adapter("adapter", card, *adapter)), least=1)


@pytest.mark.full
@pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux", reason="the stand-in is built by gcc"
)
def test_rehearsed_end_to_end(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every step on the stand-in for a card: all is written, and nothing fails but the numbers."""
    kept = getattr(request.config, "cache", None)
    cache = kept.mkdir("launch") if kept else tmp_path / "cache"
    command = ["-m", "tests.launch.gpu_check", "--cache", str(cache), "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "rehearsed: no kernel ran" in done.stdout
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["failed"] == []
    assert content["late"] == []
    assert [row["suite"] for row in content["rows"]] == ["eager", "graphs"] * 2 + ["steps"] * 4
    cases = {re.split("[:,]", each["case"])[0] for each in content["exactness"]}
    lora = {"LoRA forward", "LoRA backward", "persistent kernels", "dropout masks", "strides", "beyond 2 GiB"}
    assert cases == lora | {"DoRA", "adapter", "candidates", "replays and compiled graphs"}
    assert (path.with_suffix("") / "report.html").exists()
