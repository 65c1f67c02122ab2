"""Checkpoints are whole or not there."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.transfer.training.checkpoint import Checkpoints
from tests.training_runs import make_trainer


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
