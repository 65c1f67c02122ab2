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

pytest.importorskip("triton", reason="the check is of the kernels")

from fastlora.bench.gpu_check import child, processes, run
from fastlora.bench.gpu_check.__main__ import check, main
from fastlora.bench.gpu_check.items import Item, failure, work_through
from fastlora.bench.gpu_check.run import STEPS, GpuCheck, NothingToCheckError, Step
from fastlora.bench.gpu_check.summary import summary

ROOT = Path(__file__).parents[1]
PROCESS = (sys.executable, str(ROOT / "tests" / "gpu_check_process.py"))
# what GPU images lack
OPTIONAL = """
accelerate jinja2 matplotlib packaging peft PIL platformdirs pytest rich safetensors timm tomli_w torchvision
transformers typer
"""


def without(packages: str) -> str:
    """Python that finds what is installed but for these."""
    return f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] in {packages.split()} else super().find_spec(name, *rest)
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
    assert content["profiles"] == [{"case": "a layer", "kernel_us": {"lora_forward": 900.0}}]
    # the layers' end, 80 % of the budget, and what the last step takes
    assert seconds >= 8.0
    assert content["steps"][1]["seconds"] < 10.0


def test_the_steps_share_what_the_first_look_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take half of the least budget."""
    now, ends = [1000.0], dict[str, float]()

    def follow(command: Any, shares: int, folder: Path, ends_at: float, take: Any) -> None:
        ends[command[-1]] = ends_at - 1000
        if command[-1] == "preflight":
            now[0] += 60
            take([{"preflight": {"device": "a card", "environment": {}, "processes": 1}}])

    monkeypatch.setattr(run, "follow", follow)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))
    GpuCheck(tmp_path, budget=120.0, tell=lambda line: None).run()
    assert ends == pytest.approx({"preflight": 60, "exactness": 87, "layers": 108, "training": 118.8})


def test_profiles_are_made_after_all_that_is_timed() -> None:
    names = [item.name for item in child.items_of("layers", torch.device("cuda", 0))]
    timed, profiles = names[: len(names) // 2], names[len(names) // 2 :]
    assert profiles == [f"profile: {name}" for name in timed]


def test_what_crashes_too_often_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MOST_CRASHES", 1)
    found: list[Any] = []
    processes.follow([*PROCESS, "exactness"], 2, tmp_path, time.monotonic() + 60, found.extend)
    assert [each["failed"]["case"] for each in found if "failed" in each] == ["crashing"]
    assert [each["late"] for each in found if "late" in each] == ["after it"]


def passes(step: str, tmp_path: Path) -> tuple[bool, dict[str, Any]]:
    gpu = GpuCheck(tmp_path, budget=60.0, child=PROCESS, tell=lambda line: None)
    path = gpu.run([Step(step, "a step", 1.0)])
    return gpu.passed, json.loads(path.read_text())


def test_it_passes_where_all_was_done(tmp_path: Path) -> None:
    from fastlora.bench.page import write_report

    passed, content = passes("training", tmp_path)
    assert passed
    assert content["complete"] is True
    (path,) = tmp_path.glob("*.json")
    page = write_report(path)[0].read_text("utf-8")
    # how the suites were timed that are not in it
    assert "Training steps: wall time" in page
    assert "CUDA graphs" not in page
    assert "CUDA events" not in page


def test_nothing_done_is_no_success(tmp_path: Path) -> None:
    passed, content = passes("idle", tmp_path)
    assert not passed
    assert content["failed"] == [{"case": "a step", "error": "nothing was checked"}]
    gpu = GpuCheck(tmp_path, budget=60.0, child=PROCESS, tell=lambda line: None)
    gpu.run([])
    assert not gpu.passed


def test_a_process_that_leaves_without_a_word_is_told(tmp_path: Path) -> None:
    passed, content = passes("leaving", tmp_path)
    assert not passed
    assert [each["what"] for each in content["exactness"]] == ["first", "after it"]
    (failed,) = content["failed"]
    assert failed["case"] == "left"
    assert failed["error"].startswith("its process ended with exit code 0")


def test_what_was_tuned_here_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    passed, content = passes("told", tmp_path)
    assert passed
    assert content["exactness"][0]["what"] != str(tmp_path)


@pytest.mark.parametrize("given", ["83", "nan", "inf"])
def test_a_budget_that_nothing_fits_in_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--budget", given])
    assert ended.value.code == 2
    assert f"expected a --budget of 120 seconds at least, got {given}" in capsys.readouterr().err


def test_it_does_not_pass(ran: tuple[dict[str, Any], GpuCheck, Path, float]) -> None:
    assert ran[0]["complete"] is False
    assert not ran[1].passed
    assert [each["what"] for each in ran[1].wrong] == ["a tile"]


def test_the_summary_and_the_page_tell_it(ran: tuple[dict[str, Any], GpuCheck, Path, float]) -> None:
    from fastlora.bench.page import write_report

    text = "\n".join(summary(ran[2]))
    assert "exactness: 4 right, 1 wrong" in text
    assert "wrong: a kernel: a tile" in text
    assert "profile: a layer: lora_forward 900.0 µs" in text.splitlines()
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


def test_an_item_that_is_too_large_was_not_checked() -> None:
    error = torch.OutOfMemoryError("tried to allocate 4 GiB")

    def whole() -> Iterator[dict[str, Any]]:
        yield {"row": 1}
        raise error

    def parts(*found: dict[str, Any]) -> list[Any]:
        tiles = [failure("a tile", error), *found]
        return list(work_through([Item("a", lambda: tiles)], time.monotonic() + 60))

    told = {"case": "a", "error": "OutOfMemoryError: tried to allocate 4 GiB"}
    assert list(work_through([Item("a", whole)], time.monotonic() + 60))[2:] == [{"failed": told}]
    assert parts()[2]["failed"]["error"].startswith("not checked")
    assert [list(each) for each in parts({"row": 1})] == [["begin"], ["left_out"], ["row"]]


def test_a_process_takes_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Item(name, lambda name=name: [{"row": name}]) for name in "abcdef"]  # type: ignore[misc]
    monkeypatch.setattr(child, "items_of", lambda step, device: items)
    path = tmp_path / "lines"
    assert child.main(["layers", f"--output={path}", "--share=1", "--of=2", "--skip=1"]) == 0
    told, *found = (json.loads(line) for line in path.read_text().splitlines())
    assert told == {"items": ["d", "f"]}
    assert found[1::2] == [{"row": "d"}, {"row": "f"}]
    assert found[-1] == {"end": "layers"}


@pytest.mark.full
def test_without_a_card_and_optional_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(without(OPTIONAL))
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


@pytest.mark.full
def test_without_triton_the_first_look_says_so(tmp_path: Path) -> None:
    code = f"""
{without("triton")}
import torch
torch.cuda.is_available = lambda: True
from fastlora.bench.gpu_check import child
raise SystemExit(child.main(["preflight", "--output", {str(tmp_path / "lines")!r}]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "expected the package triton" in (tmp_path / "lines").read_text()


def test_a_first_look_that_crashes_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no driver')"]
    with pytest.raises(NothingToCheckError, match="exit code 1: no driver"):
        GpuCheck(tmp_path, child=command).run()
    assert check(GpuCheck(tmp_path, child=command), []) == 2


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
    assert [row["suite"] for row in content["rows"]] == ["eager", "graphs"] * 4 + ["steps"] * 4
    profiled = [
        "a layer, p = 0",
        "a layer, p = 0.1",
        "LLaMA-8B q, o, NF4, p = 0.1",
        "LLaMA-8B q, k, v, p = 0",
    ]
    assert [each["case"] for each in content["profiles"]] == profiled
    cases = {re.split("[:,]", each["case"])[0] for each in content["exactness"]}
    lora = {"LoRA forward", "LoRA backward", "persistent kernels", "dropout masks", "strides", "beyond 2 GiB"}
    quantised = {"4 bits dense", "8 bits dense", "LoRA over 4 bits"}
    others = {"DoRA", "adapter", "shared input", "candidates", "replays and compiled graphs"}
    assert cases == lora | quantised | others
    assert (path.with_suffix("") / "report.html").exists()
