"""Runs of ``fastlora demo`` on dialogues."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.cli._progress import LiveReporter
from fastlora.transfer.demo.language.candidate import Candidate
from fastlora.transfer.models import smollm2

STEPS = 3
WIDE = {"COLUMNS": "200"}


@dataclass(frozen=True)
class LanguageRun:
    """What a run wrote and printed, the tasks that it told of, and TRL's trainers, PEFT's own model first."""

    quantised: str | None
    folder: Path
    stdout: str
    stderr: str
    told: list[tuple[str, int, int]]
    trainers: list[Any]

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report


def fused_layers(trainer: Any) -> int:
    return sum(type(layer).__name__.startswith("FusedLinear") for layer in trainer.model.modules())


def language_demo(folder: Path, quantised: str | None) -> LanguageRun:
    told: list[tuple[str, int, int]] = []

    def advance(
        self: LiveReporter, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        told.append((task, done, total))

    trainers: list[Any] = []
    train = Candidate.train

    def trained(self: Candidate) -> dict[str, Any]:
        trainers.append(self.trainer)
        return train(self)

    options = [] if quantised is None else ["--quantised", quantised]
    command = ["demo", "--output", str(folder), "--max-steps", str(STEPS), "--seed", "3", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "check_installed", lambda: None)
        patch.setattr(LiveReporter, "advance", advance)
        patch.setattr(Candidate, "train", trained)
        result = CliRunner().invoke(app, command, env=WIDE)
    assert result.exit_code == 0, result.output
    trainers.sort(key=fused_layers)
    return LanguageRun(quantised, folder, result.stdout, result.stderr, told, trainers)
