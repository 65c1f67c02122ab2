"""``fastlora tune --show`` and ``--json``: what they say of layers that share their input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastlora.cli import app, tune
from fastlora.ops import tuned_file
from fastlora_kernels.choose.tuned import REFERENCE, Choice
from tests.tuning_models import GPU, SMALL_CARD, device, pretend, record, shared_record


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the records for a card lie, which is here."""
    pytest.importorskip("triton", reason="the file says which Triton made it")
    pretend(monkeypatch)
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_device", device)
    monkeypatch.setattr(tuned_file, "gpu_key", lambda device: GPU)
    return tuned_file.path_of(GPU)


def show(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", "--show", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_object_says_its_kind_and_has_a_shape(kept: Path) -> None:
    tuned_file.write(kept, GPU, [record(), shared_record(Choice("separate"), Choice("separate"))])
    alone, together = json.loads(show("--json"))
    assert (alone["kind"], together["kind"]) == ("layer", "shared")
    assert alone["shape"]["n"] == 48
    # as one layer of all
    assert (together["shape"]["n"], together["shape"]["r"], len(together["shapes"])) == (96, 48, 3)


def test_a_winner_that_is_not_taken_is_marked(kept: Path) -> None:
    """Where eager won for a layer alone, all go apart: here from the host, and with the mask of no other."""
    together = shared_record(Choice("epilogue"), Choice("epilogue"))
    us = {"epilogue": 2.0, "separate": 3.0}
    together = replace(together, microseconds={"graph": us, "host": us})
    tuned_file.write(kept, GPU, [record(from_host=REFERENCE), together, replace(together, dropping=True)])
    shown = show().partition("One by one")[2].splitlines()
    rows = [line for line in shown if " epilogue " in line]
    assert ["not taken: eager won for a layer" in line for line in rows] == [False, True, False, False]
    assert ["1.50×" in line for line in rows] == [True, False, True, True]


def test_times_that_were_taken_out_by_hand_are_left_blank(kept: Path) -> None:
    won = Choice("separate")
    tuned_file.write(
        kept,
        GPU,
        [replace(record(), microseconds={}), replace(shared_record(won, won), microseconds={"graph": {}})],
    )
    shown = show()
    assert "40 × 32 × 48" in shown
    assert "40 × 32 × 48 + 16 + 32" in shown


@pytest.mark.parametrize("size", [0, -16, "48", 48.0])
@pytest.mark.parametrize("kind", ["records", "shared"])
def test_sizes_below_one_are_damage(kind: str, size: Any, kept: Path) -> None:
    tuned_file.write(kept, GPU, [record(), shared_record(Choice("epilogue"), Choice("epilogue"))])
    content = json.loads(kept.read_text())
    (found,) = content[kind]
    (found["shape"] if kind == "records" else found["shapes"][1])["n"] = size
    kept.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="a damaged file .*whole numbers of at least 1"):
        assert tuned_file.read_or_warn(GPU, SMALL_CARD) == []
