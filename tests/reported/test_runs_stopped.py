"""Runs that are stopped, locked out, resumed after their end, or left without room on the disk."""

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora._core import files
from fastlora._core.interruption import Interrupted
from fastlora.cli._progress import LiveReporter
from fastlora.transfer.training import checkpoint
from fastlora.transfer.training.lock import LOCK, sole_use
from tests.run_folders import PROBE, contents, invoke, make_run, refused
from tests.training_runs import make_trainer


class Signaller:
    """Sends its own process a signal at an optimiser step."""

    def __init__(self, number: int, step: int, times: int = 1) -> None:
        self._number, self._step, self._times = number, step, times

    def note(self, text: str) -> None:
        """Nobody listens."""

    def advance(
        self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        if done == self._step:
            for _ in range(self._times):
                os.kill(os.getpid(), self._number)


def steps_of(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


@pytest.mark.parametrize("step", [2, 3], ids=["in an epoch", "at an epoch's end"])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, step: int) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"the checkpoint of step {step} is in") as caught:
        make_trainer("epochs", tmp_path / "stopped", reporter=Signaller(signal.SIGINT, step)).fit()
    assert caught.value.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    assert steps_of(tmp_path / "stopped") == [f"step-{step:08d}"]
    resumed = make_trainer("epochs", tmp_path / "stopped")
    assert resumed.fit(resume=True).resumed_at == step
    whole = make_trainer("epochs", tmp_path / "whole")
    whole.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_trainer("epochs", tmp_path, reporter=Signaller(signal.SIGINT, 2, times=2)).fit()
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_run(tmp_path_factory.mktemp("ended"), epochs=2)


@pytest.mark.parametrize(
    ("number", "task"),
    [(signal.SIGINT, "check pictures"), (signal.SIGTERM, "train")],
    ids=["SIGINT", "SIGTERM"],
)
def test_the_command_says_how_to_go_on(
    ended: tuple[Path, Path], tmp_path: Path, number: signal.Signals, task: str, monkeypatch: Any
) -> None:
    def advance(self: LiveReporter, now: str, *values: Any, **more: Any) -> None:
        if now == task:
            monkeypatch.setattr(LiveReporter, "advance", original)
            os.kill(os.getpid(), number)

    original = LiveReporter.advance
    monkeypatch.setattr(LiveReporter, "advance", advance)
    typed = ["finetune", ended[0], *PROBE, "--epochs", 2, "--output", tmp_path / "a run"]
    result = invoke(*typed)
    assert result.exit_code == 128 + number
    assert f"interrupted by {number.name}" in result.stderr
    assert f"--output '{tmp_path}/a run' --resume" in result.stderr.splitlines()[-1]
    assert invoke(*typed, "--resume").exit_code == 0
    assert (tmp_path / "a run" / "model.safetensors").read_bytes() == (
        ended[1] / "model.safetensors"
    ).read_bytes()


def test_other_commands_end_without_a_traceback(monkeypatch: Any) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlora.cli.doctor.findings", interrupted)
    result = invoke("doctor")
    assert (result.exit_code, result.stderr) == (130, "interrupted by SIGINT\n")


def _hold(folder: Path, ready: Any) -> None:
    with sole_use(folder):
        ready.set()
        signal.pause()


# the child only waits
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_folder_in_use_is_refused_and_a_killed_run_leaves_no_lock(
    ended: tuple[Path, Path], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    refused(
        "finetune", ended[0], *PROBE, "--output", tmp_path, told=f"is in use by process {holder.pid}; wait"
    )
    domains = ["--source", ended[0], "--target", ended[0]]
    refused("adapt", *domains, *PROBE, "--output", tmp_path, told=f"is in use by process {holder.pid}; wait")
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / LOCK).exists()
    with sole_use(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_used_folder_is_refused_before_anything_is_read(ended: tuple[Path, Path]) -> None:
    before = contents(ended[1])
    refused(
        "finetune", ended[0], *PROBE, "--output", ended[1], told="has one at step 4; resume it (--resume)"
    )
    assert contents(ended[1]) == before


def test_a_finished_run_is_left_as_it_is(ended: tuple[Path, Path]) -> None:
    before = contents(ended[1])
    typed = ["finetune", ended[0], *PROBE, "--output", ended[1], "--resume"]
    result = invoke(*typed, "--epochs", 2)
    assert result.exit_code == 0, result.output
    assert "this run is finished; nothing in" in result.output.replace("\n", " ")
    assert "Wrote" not in result.output
    assert json.loads(invoke(*typed, "--epochs", 2, "--json").stdout)["unchanged"] is True
    refused(*typed, "--epochs", 3, told="--epochs was 2, is 3 now")
    refused(*typed, "--epochs", 2, "--seed", 3, told="--seed was 0, is 3 now")
    assert contents(ended[1]) == before


@pytest.mark.parametrize("name", ["model.safetensors", "report.json"])
def test_a_full_disk_at_the_end_loses_nothing(
    ended: tuple[Path, Path], tmp_path: Path, name: str, monkeypatch: Any
) -> None:
    def write(path: Path, content: bytes) -> None:
        if path.name.startswith(f".{Path(name).stem}.") and path.suffix == Path(name).suffix:
            original(path, content[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, content)

    original = files.write_through
    monkeypatch.setattr(files, "write_through", write)
    typed = ["finetune", ended[0], *PROBE, "--epochs", 2, "--output", tmp_path / "run"]
    told = refused(*typed, code=1, told=f"MiB at {tmp_path}/run/{name}, ")
    assert "Errno" not in told
    assert told.endswith("; make room; go on with: fastlora " + " ".join(map(str, typed)) + " --resume")
    assert not list((tmp_path / "run").rglob(".*"))
    assert steps_of(tmp_path / "run")
    monkeypatch.setattr(files, "write_through", original)
    assert invoke(*typed, "--resume").exit_code == 0
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "run" / file).read_bytes() == (ended[1] / file).read_bytes()


def test_a_full_disk_under_a_checkpoint_tells_how_to_go_on(
    ended: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_through", full)
    typed = ["finetune", ended[0], *PROBE, "--output", tmp_path]
    told = refused(*typed, code=1, told="there is none before it; make room")
    assert "Errno" not in told
    assert told.endswith("--resume")
