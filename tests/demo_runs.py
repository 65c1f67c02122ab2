"""Runs of ``fastlora demo`` on few, small pictures."""

import functools
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastlora
from fastlora._core import backend
from fastlora.cli import app
from fastlora.cli._progress import LiveReporter
from fastlora.transfer.data.bundled import ImageSet, load_images, split
from fastlora.transfer.demo import run as demo_run
from fastlora.transfer.demo.methods import RECIPES, Recipe
from fastlora.transfer.demo.study import transforms
from fastlora.transfer.models.backbones import dinov2_vits14
from fastlora.transfer.training.device import make_accelerator
from fastlora.transfer.training.prediction import predict

SIZE, SEED = 28, 5
TRAIN, VALIDATION, TEST = 64, 32, 64
PICTURES = {"curves.png", "accuracy.png", "confusion.png"}
CLASSES = {"elpv": 2, "mnist5k": 10}
HEAD_WIDTH = 385
BACKBONE = sum(p.numel() for p in dinov2_vits14(SIZE, 1).parameters()) - HEAD_WIDTH
# rank 8 in 12 blocks: q, k, v as one 384 → 1152, out 384 → 384, MLP 384 → 1536 → 384
LORA = 12 * 8 * ((384 + 1152) + (384 + 384) + 2 * (384 + 1536))


@dataclass(frozen=True)
class DemoRun:
    """What a run wrote, printed, and told of each step: task, number, how many in all, and backend."""

    data: str
    folder: Path
    stdout: str
    stderr: str
    steps: list[tuple[str, int, int, str]]

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report

    def method(self, strategy: str) -> dict[str, Any]:
        found: dict[str, Any] = next(m for m in self.report["methods"] if m["strategy"] == strategy)
        return found

    def accuracy_of_file(self, folder: str) -> float:
        """That of what was saved, loaded into a fresh model, on the test pictures."""
        test = split(some_pictures(self.data), train=TRAIN, validation=VALIDATION, seed=SEED).test.labelled()
        model = fastlora.load_adapter(dinov2_vits14(SIZE, CLASSES[self.data]), self.folder / folder)
        accelerator = make_accelerator()
        seen = test.with_transform(transforms(())[1])
        logits = predict(model.to(accelerator.device), seen, 16, 0, accelerator)
        return (logits.argmax(dim=1) == torch.tensor(test.labels)).double().mean().item()


@functools.cache
def some_pictures(data: str) -> ImageSet:
    """The first ones of a data set, which takes seconds to read."""
    return load_images(data, SIZE).first(TRAIN + VALIDATION + TEST)


def small(data: str) -> Recipe:
    return replace(RECIPES[data], image_size=SIZE, train=TRAIN, validation=VALIDATION)


def handlers() -> list[Any]:
    """What Ctrl-C and SIGTERM do."""
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def demo(data: str, folder: Path, *arguments: str) -> DemoRun:
    command: Sequence[str] = ["demo", "--data", data, "--output", str(folder), "--seed", str(SEED)]
    told: list[tuple[str, int, int, str]] = []

    def advance(
        self: LiveReporter, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        told.append((task, done, total, backend.selected()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveReporter, "advance", advance)
        patch.setitem(RECIPES, data, small(data))
        patch.setattr(demo_run, "load_images", lambda name, size: some_pictures(name))
        before = handlers()
        result = CliRunner().invoke(app, [*command, *arguments])
    assert handlers() == before
    assert result.exit_code == 0, result.output
    return DemoRun(data, folder, result.stdout, result.stderr, told)
