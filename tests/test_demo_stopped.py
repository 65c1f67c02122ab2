"""``fastlora demo`` that doesn't come to its end leaves nothing behind."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.cli._progress import LiveReporter
from fastlora.transfer.demo import run as demo_run
from fastlora.transfer.demo.methods import RECIPES
from fastlora.transfer.demo.study import EAGER
from tests.demo_runs import handlers, small, some_pictures

# of 16 pictures each: two epochs and a step more, of which the eager run does the epochs
STEPS, EAGER_STEPS = 9, 8


def test_a_demo_that_is_interrupted_stops_at_once_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(
        self: LiveReporter, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        told.append((task, done))
        # at the last step of the run that ends first
        if (task, done) == (EAGER, EAGER_STEPS):
            os.kill(os.getpid(), signal.SIGINT)

    told: list[tuple[str, int]] = []
    output, temporary, before = tmp_path / "output", tmp_path / "temporary", handlers()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(LiveReporter, "advance", interrupted)
    monkeypatch.setitem(RECIPES, "elpv", small("elpv"))
    monkeypatch.setattr(demo_run, "load_images", lambda name, size: some_pictures("mnist5k"))
    result = CliRunner().invoke(
        app, ["demo", "--data", "elpv", "--output", str(output), "--max-steps", str(STEPS)]
    )
    assert result.exit_code == 128 + signal.SIGINT
    assert result.stderr.splitlines()[-1] == "interrupted by SIGINT"
    assert "checkpoint" not in result.stderr
    assert told[-1] == (EAGER, EAGER_STEPS)
    assert handlers() == before
    assert list(temporary.iterdir()) == list(output.iterdir()) == []


def test_failure_later_on_leaves_no_half_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(*_: object, **__: object) -> Any:
        raise FloatingPointError("expected a finite loss, got nan at step 1; lower lr")

    monkeypatch.setitem(RECIPES, "elpv", small("elpv"))
    monkeypatch.setattr(demo_run, "load_images", lambda name, size: some_pictures("mnist5k"))
    monkeypatch.setattr("fastlora.transfer.demo.study.begin", breaks)
    result = CliRunner().invoke(app, ["demo", "--data", "elpv", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: expected a finite loss" in result.stderr
    assert list(tmp_path.iterdir()) == []
