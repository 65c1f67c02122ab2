"""``fastlora predict`` and ``fastlora export``: the same answers, whatever the format."""

import csv
import errno
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.transfer.data import open_images
from fastlora.transfer.finetune import export, export_run, load_run
from fastlora.transfer.finetune.saved import SavedRun
from fastlora.transfer.models.backbones import dinov2_vits14
from tests.cases import cases
from tests.finetune_models import CLASSES, write_pictures

SETTINGS = ["--image-size", "28", "--epochs", "2", "--batch-size", "8", "--precision", "no"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", count=6)


class Runs(dict[str, Path]):
    """Finished runs, each made when it is first asked for: processes share the tests.

    Their names are strategies, of dinov2_vits14 unless another model is named: "lora of resnet18".
    """

    def __init__(self, data: Path, folder: Path) -> None:
        super().__init__()
        self.data, self.folder = data, folder

    def __missing__(self, name: str) -> Path:
        output = self[name] = self.folder / name
        strategy, _, model = name.partition(" of ")
        settings = [*SETTINGS, *(["--model", model, "--weights", "none"] if model else [])]
        result = invoke("finetune", self.data, *settings, "--strategy", strategy, "--output", output)
        assert result.exit_code == 0, result.output
        return output


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(data, tmp_path_factory.mktemp("runs"))


# what each exported file says of itself
CARD: dict[str, Any] = {
    "classes": list(CLASSES),
    "input": {"name": "images", "shape": ["batch", 3, 28, 28], "dtype": "float32"},
    "output": {"name": "logits", "shape": ["batch", 2]},
    "transform": [
        {"step": "convert", "mode": "RGB"},
        {"step": "crop the middle of strips", "to": "16:1"},
        {"step": "resize the shorter side", "to": 32, "interpolation": "bicubic", "antialias": True},
        {"step": "crop the centre", "to": 28},
        {"step": "scale", "divide by": 255},
        {"step": "normalise", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    ],
}


def card_of_a_run(name: str) -> dict[str, Any]:
    """What its exported file says: ResNet's pictures are resized in another way."""
    steps = [dict(step) for step in CARD["transform"]]
    if name.endswith("resnet18"):
        steps[2]["interpolation"] = "bilinear"
    return CARD | {"transform": steps}


def logits_of(folder: Path, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(count, 3, 28, 28)
    return images, load_run(folder).model(images)


@pytest.mark.full
def test_merged_weights_are_the_plain_models(runs: Runs, tmp_path: Path) -> None:
    agreement = export_run(runs["lora"], "state_dict", tmp_path / "merged.safetensors")
    plain = dinov2_vits14(28, 2)
    plain.load_state_dict(load_file(agreement.path))
    images, expected = logits_of(runs["lora"])
    torch.testing.assert_close(plain.eval()(images), expected, rtol=1e-4, atol=1e-4)
    assert agreement.error <= max(8 * agreement.eager_error, 1e-5)
    with safe_open(agreement.path, "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("format") == "pt"
    assert {name: json.loads(metadata[name]) for name in CARD} == CARD
    assert agreement.same_answers


@pytest.mark.full
# the graph of a ResNet is made in a quarter of the time
@pytest.mark.parametrize("name", ["lora of resnet18", "lora", "prompt", "adapter", "feature_extraction"])
def test_a_program_answers_the_same_for_any_batch(runs: Runs, tmp_path: Path, name: str) -> None:
    agreement = export_run(runs[name], "torch", tmp_path / "model.pt2")
    images, expected = logits_of(runs[name])
    extra = {"model.json": ""}
    answer = torch.export.load(agreement.path, extra_files=extra).module()(images)
    card = json.loads(extra["model.json"])
    assert {field: card[field] for field in CARD} == card_of_a_run(name)
    assert card["model"] == (name.partition(" of ")[2] or "dinov2_vits14")
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", cases(["lora of resnet18"], ["adapter", "lora"]))
def test_onnx_answers_the_same_for_any_batch(runs: Runs, tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="compares with ONNX Runtime, which is optional")
    result = invoke("export", runs[name], "--format", "onnx", "--output", tmp_path / "model.onnx")
    assert result.exit_code == 0, result.output
    assert "both name the same classes" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    images, expected = logits_of(runs[name])
    metadata = session.get_modelmeta().custom_metadata_map
    assert {field: json.loads(metadata[field]) for field in CARD} == card_of_a_run(name)
    (answer,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["adapter", "prompt"])
def test_what_plain_weights_can_not_hold_is_refused(runs: Runs, strategy: str) -> None:
    result = invoke("export", runs[strategy], "--format", "state_dict")
    assert result.exit_code == 2
    assert "can't be folded in; export it as onnx or torch" in result.stderr
    assert not list(runs[strategy].glob("*merged*"))


def test_a_model_that_answers_otherwise_is_not_written(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Any:
        answer = original(*arguments)
        return lambda images: answer(images) + 1e-3

    original = export._write_state_dict
    monkeypatch.setitem(export._EXPORTERS, "state_dict", wrong)
    with pytest.raises(ValueError, match="expected the exported model to answer as the run's own"):
        export_run(runs["lora"], "state_dict", tmp_path / "merged.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", cases(["onnx"], ["torch"]))
def test_a_file_that_the_disk_does_not_take_leaves_the_older_one(
    format: export.Format, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(model: torch.nn.Module, run: SavedRun, path: Path) -> torch.nn.Module:
        path.write_bytes(b"new")
        return run.model

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # made before the disk is full
    run = runs["lora"]
    older = tmp_path / f"model{export.SUFFIXES[format]}"
    older.write_bytes(b"older")
    monkeypatch.setitem(export._EXPORTERS, format, written)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(run, format, older)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]
    monkeypatch.undo()
    monkeypatch.setitem(export._EXPORTERS, format, written)
    assert export_run(run, format, older).path.read_bytes() == b"new"


def test_predictions_are_the_models(runs: Runs, data: Path) -> None:
    run = load_run(runs["lora"])
    images = open_images(data).with_transform(run.transform)
    shares = run.model(torch.stack([images[index][0] for index in range(12)])).softmax(dim=1)
    result = invoke("predict", runs["lora"], data, "--format", "json", "--top", 2, "--batch-size", 5)
    answers = json.loads(result.stdout)
    assert [answer["path"] for answer in answers] == [str(data / name) for name in images.names]
    for answer, share in zip(answers, shares, strict=True):
        found = dict(answer["classes"])
        assert [found[name] for name in CLASSES] == pytest.approx(share.tolist(), abs=1e-5)


def test_predictions_as_csv_and_table(runs: Runs, data: Path) -> None:
    picture = data / "dark" / "00.png"
    printed = invoke("predict", runs["lora"], picture, "--format", "csv").stdout
    (row,) = csv.DictReader(io.StringIO(printed))
    assert row["path"] == str(picture)
    assert row["class"] in CLASSES
    assert row["class"] in invoke("predict", runs["lora"], picture).stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["predict", "nowhere", "x.png"], "found no model.json in nowhere; fastlora finetune writes it"),
        (["export", "nowhere"], "found no model.json in nowhere"),
    ],
)
def test_no_run_is_told(arguments: list[str], told: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_no_pictures_are_told(runs: Runs, tmp_path: Path) -> None:
    assert "found nothing at gone.png" in invoke("predict", runs["lora"], "gone.png").stderr
    assert "found none" in invoke("predict", runs["lora"], tmp_path).stderr
    (tmp_path / "broken.png").write_bytes(b"no picture")
    result = invoke("predict", runs["lora"], tmp_path)
    assert result.exit_code == 1
    assert "broken.png" in result.stderr


def test_damaged_runs_are_told(runs: Runs, tmp_path: Path) -> None:
    run = shutil.copytree(runs["feature_extraction"], tmp_path / "run")
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="expected the weights of this run"):
        load_run(run)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="copy the whole folder"):
        load_run(run)
    (run / "model.json").write_text("{}")
    with pytest.raises(ValueError, match="expected format 1"):
        load_run(run)
    (run / "model.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        load_run(run)
