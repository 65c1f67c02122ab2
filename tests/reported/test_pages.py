"""Reports hold any number of classes, epochs and cases, and names that mean something to a formatter."""

import json
import struct
import time
import warnings
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import fastlora
from fastlora._core.words import visible
from fastlora.cli import app
from fastlora.domain.training.embedding import Cloud, draw_embedding
from fastlora.domain.training.page import curves as domain_curves
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.finetune.evaluation import evaluate
from fastlora.transfer.finetune.page import TEMPLATE, _matrix, confused, curves, render
from fastlora.transfer.finetune.record import ReportError
from fastlora.transfer.metrics import accuracy_interval
from fastlora.transfer.plots import draw_accuracies, draw_confusions, draw_curves
from fastlora.transfer.report.page import percent
from fastlora.transfer.report.style import drawn, png
from tests.cases import cases
from tests.finetune_models import write_pictures

# mathtext, TeX, formats, HTML, what legends leave out, other scripts, what fonts lack, control characters
NAMES = (
    "under $10$ \\frac",
    "$5^$",
    "_^{$$",
    "_hidden",
    "100 % {0} %s",
    "<script>alert('x')</script>\"",
    "猫",
    "👩\u200d🔬",
    "قط",
    "a\nb\x1b[31m\u202e",
    "n" * 300,
    "\\",
)


def size(picture: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def epochs(count: int) -> list[dict[str, Any]]:
    names = (
        "train_loss",
        "validation_loss",
        "accuracy",
        "balanced_accuracy",
        "target_accuracy",
        "a_distance",
    )
    more = {"target_balanced_accuracy": None, "domain_accuracy": None, "strength": 1.0}
    return [{"epoch": number + 1} | dict.fromkeys(names, 0.5) | more for number in range(count)]


def report_of(classes: tuple[str, ...], count: int = 3) -> tuple[dict[str, Any], LabelledImages]:
    """What a run of so many epochs would say, whose model confuses each class with the next."""
    total = len(classes)
    labels = tuple(range(total))
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    names = tuple(f"{name}/0.png" for name in classes)
    images = LabelledImages(classes, labels, names, lambda index: picture)
    logits = torch.eye(total).roll(1, dims=1)
    report = {
        "config": {"model": NAMES[0], "data": NAMES[5]},
        "strategy": "lora",
        "strategy_summary": "nothing",
        "classes": list(classes),
        "pictures": {"train": 10, "validation": total, "test": 0},
        "evaluated_on": "validation",
        "evaluation": evaluate(logits, images),
        "epochs": epochs(count),
        "best_epoch": 1,
        "parameters": fastlora.parameter_report(nn.Linear(2, 3)).as_json(),
        "recommendation": {"strategy": "lora", "reason": "none", "sources": ["x"]},
        "seconds": 1.0,
        "steps": count,
        "peak_memory_bytes": None,
        "stopped_early": False,
        "resumed_at": None,
        "device_name": "none",
        "device": "cpu",
        "threads": 1,
        "precision": "no",
        "versions": {"python": "3"},
    }
    return report, images


def page_of(classes: tuple[str, ...], count: int = 3) -> str:
    report, images = report_of(classes, count)
    return render(TEMPLATE, report, images, {"curves": curves(report["epochs"], 1)})


@pytest.mark.parametrize("count", cases([20, 21], [2, 1000]))
def test_a_matrix_has_a_bounded_size(count: int) -> None:
    confusion = (torch.eye(count) * 2).long()
    classes = [f"class {number}" for number in range(count)]
    began = time.process_time()
    picture = png(_matrix(confusion.tolist(), classes))
    width, height = size(picture)
    assert width * height < 6e6
    # minutes and gigabytes once
    assert time.process_time() - began < 20


def test_a_page_of_many_classes_lists_the_worst_pairs() -> None:
    classes = tuple(f"class {number}" for number in range(150))
    page = page_of(classes)
    assert "Most often confused" in page
    assert page.count("<tr>") < 150 + 100
    assert "Most often confused" not in page_of(classes[:5])
    worst = confused([[0, 5, 0], [1, 0, 9], [0, 0, 7]], ["a", "b", "c"])
    assert [(row["true"], row["predicted"], row["count"]) for row in worst] == [
        ("b", "c", 9),
        ("a", "b", 5),
        ("b", "a", 1),
    ]


def test_any_name_can_be_drawn_and_shown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(NAMES)
    assert "<script>alert" not in page
    text = unescape(page)
    assert not [name for name in NAMES if visible(name) not in text]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_drawn_name_is_itself(name: str) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0], [0], label=drawn(name))
    axes.set_title(drawn(name))
    legend = axes.legend()
    assert len(legend.get_texts()) == 1
    assert len(drawn(name)) <= 30
    assert size(png(figure))


def methods_of(classes: int) -> list[dict[str, Any]]:
    """As in the demo's report."""
    scores = {"accuracy": 1.0, "accuracy_interval": (0.9, 1.0), "balanced_accuracy": 1.0}
    record = {"epoch": 1, "train_loss": 1.0, "accuracy": 0.5}
    confusion = torch.eye(classes, dtype=torch.int64).tolist()
    return [
        {
            "title": name,
            "trainable_parameters": 10,
            "seconds": 1.0,
            "epochs": [record],
            "confusion": confusion,
            **scores,
        }
        for name in NAMES[1:4]
    ]


def test_figures_of_several_methods_take_any_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(methods_of(3), NAMES[1])
        draw_accuracies(methods_of(3), NAMES[2])
        width, height = size(draw_confusions(methods_of(300)[:1], [NAMES[0]] * 300, NAMES[0]))
    assert width * height < 25e6


def test_an_embedding_takes_any_name_and_any_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.domain.training.embedding._placed", lambda features, seed: features)
    features, labels = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12)
    for names in (NAMES[:8], NAMES):
        known = labels % len(names)
        figure = draw_embedding(
            [Cloud("Before", features, features)], known, known, names, target_note="true", seed=0
        )
        words = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(words) == 10 if len(names) == 8 else "12 classes in 8 colours" in words
        assert size(png(figure))


@pytest.mark.parametrize("draw", [curves, domain_curves], ids=["finetune", "adapt"])
def test_one_epoch_is_a_point_and_many_are_a_line(draw: Any) -> None:
    for count in (1, 200):
        lines = [
            line for axes in draw(epochs(count), 1).axes for line in axes.lines if line.get_marker() != "None"
        ]
        assert lines
        for line in lines:
            assert len(line.get_xdata()[:: line.get_markevery()]) in range(1, 21)


def test_a_huge_figure_has_fewer_pixels_an_inch() -> None:
    width, height = size(png(Figure(figsize=(300, 300))))
    assert 20e6 < width * height < 25e6


def test_wilson_interval() -> None:
    def interval(right: int, total: int) -> list[float]:
        confusion = torch.tensor([[right, total - right], [0, 0]])
        return [round(limit, 4) for limit in accuracy_interval(confusion)]

    # as statsmodels' proportion_confint(..., method="wilson") has it
    assert interval(18, 18) == [0.8241, 1.0]
    assert interval(0, 18) == [0.0, 0.1759]
    assert interval(50, 100) == [0.4038, 0.5962]
    assert interval(1, 1) == [0.2065, 1.0]
    assert [percent(share) for share in (None, float("nan"), 1.0)] == ["–", "–", "100.0 %"]


def test_a_failing_report_leaves_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no ink\nleft")

    monkeypatch.setattr("fastlora.transfer.finetune.run.write_page", fail)
    data = write_pictures(tmp_path / "data", count=4)
    quick = ["--model", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "1"]
    output = tmp_path / "run"
    result = CliRunner().invoke(
        app, ["finetune", str(data), *quick, "--strategy", "feature_extraction", "--output", str(output)]
    )
    assert result.exit_code == 1
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"saved in {output}, but its report can't be written: RuntimeError: no ink\\nleft" in told
    assert json.loads((output / "report.json").read_text())["accuracy"] >= 0
    assert (output / "model.safetensors").is_file()
    assert issubclass(ReportError, OSError)
