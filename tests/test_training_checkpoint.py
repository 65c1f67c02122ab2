"""Checkpoints are whole or not there."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora._core.interruption import Interrupted
from fastlora.transfer.training import Trainer
from fastlora.transfer.training.checkpoint import Checkpoints
from tests.training_runs import SETTINGS, Killer, make_net, make_trainer, pictures


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 5):
        checkpoints.save(step, {"value": torch.tensor(step)})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 4
    assert found[1]["value"].item() == 4


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").latest() is None


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.abc.tmp").mkdir()
    Checkpoints(tmp_path).save(2, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("damage", ["shorter", "changed", "no manifest", "no state"])
def test_damage_is_noticed(tmp_path: Path, damage: str, caplog: Any) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"value": 1})
    folder = checkpoints.save(2, {"value": 2})
    state, manifest = folder / "state.pt", folder / "manifest.json"
    content = state.read_bytes()
    if damage == "shorter":
        state.write_bytes(content[:-1])
    elif damage == "changed":
        state.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    else:
        (manifest if damage == "no manifest" else state).unlink()
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 1
    assert "step-00000002 is damaged" in caplog.text


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(1, {"value": 1})
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError, match=rf"No space left.*the last one is whole: {first}; make room") as caught:
        checkpoints.save(2, {"value": 2})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [first]


def test_a_run_on_a_full_disk_can_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    make_trainer("epochs", tmp_path / "whole").fit()
    saves = 0

    def save(self: Checkpoints, step: int, state: dict[str, Any]) -> Path:
        nonlocal saves
        saves += 1
        if saves == 2:
            monkeypatch.setattr(os, "fsync", _full)
        return original(self, step, state)

    original, fsync = Checkpoints.save, os.fsync
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(OSError, match=r"go on with resume"):
        make_trainer("epochs", tmp_path / "full").fit()
    monkeypatch.setattr(os, "fsync", fsync)
    resumed = make_trainer("epochs", tmp_path / "full")
    assert resumed.fit(resume=True).resumed_at == 3
    whole = make_trainer("epochs", tmp_path / "whole")
    whole.fit(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


class Interrupter(Killer):
    """Presses Ctrl-C after an optimiser step."""

    number = signal.SIGINT


def test_a_run_without_checkpoints_is_the_same_run(tmp_path: Path) -> None:
    kept, bare = tmp_path / "kept", tmp_path / "bare"
    for output in (kept, bare):
        trainer = Trainer(
            make_net(), pictures(), pictures(), SETTINGS, output=output, checkpoints=output == kept
        )
        trainer.fit()
        torch.save(trainer.model.state_dict(), output / "model.pt")
    assert (bare / "model.pt").read_bytes() == (kept / "model.pt").read_bytes()
    assert (bare / "steps.csv").read_bytes() == (kept / "steps.csv").read_bytes()
    assert (kept / "checkpoints").is_dir()
    assert not (bare / "checkpoints").exists()


def test_a_run_without_checkpoints_stops_at_once_and_names_none(tmp_path: Path) -> None:
    run = Trainer(
        make_net(),
        pictures(),
        pictures(),
        SETTINGS,
        output=tmp_path,
        checkpoints=False,
        reporter=Interrupter(2),
    )
    with pytest.raises(KeyboardInterrupt) as raised:
        run.fit()
    assert not isinstance(raised.value, Interrupted)
    assert not (tmp_path / "checkpoints").exists()
    train = pictures(lambda pixels: pixels * float("nan"))
    with pytest.raises(FloatingPointError) as told:
        Trainer(make_net(), train, pictures(), SETTINGS, output=tmp_path / "b", checkpoints=False).fit()
    assert "checkpoint" not in str(told.value)
