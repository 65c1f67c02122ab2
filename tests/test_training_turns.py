"""Two runs in turns, an epoch each: every one is the run that it is alone, and signals go where they did."""

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora._core.interruption import Interrupted
from fastlora.transfer.training import Trainer
from fastlora.transfer.training.checkpoint import Checkpoints
from fastlora.transfer.training.records import EpochRecord
from tests.training_runs import make_trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Listener:
    """Calls what it was given after an optimiser step."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self._step, self._act = step, act

    def note(self, text: str) -> None:
        """Nobody listens."""

    def advance(
        self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        if done == self._step:
            self._act()


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def take_turns(*runs: Generator[EpochRecord, None, None]) -> None:
    waiting = list(runs)
    while waiting:
        waiting = [run for run in waiting if next(run, None) is not None]


def test_runs_in_turns_end_as_each_does_alone(tmp_path: Path) -> None:
    # of different seeds and lengths, with dropout, mixup and noise on the pictures
    runs = {"short": {"epochs": 2, "seed": 4}, "long": {"epochs": 4, "checkpoint_every": 2}}
    alone: dict[str, Trainer] = {}
    for name, changes in runs.items():
        alone[name] = make_trainer("epochs", tmp_path / "alone" / name, **changes)
        alone[name].fit()
    turns = {name: make_trainer("epochs", tmp_path / "turns" / name, **runs[name]) for name in runs}
    take_turns(*(trainer.epochs() for trainer in turns.values()))
    for name, trainer in turns.items():
        ours, expected = trainer.model.state_dict(), alone[name].model.state_dict()
        assert all(torch.equal(ours[key], expected[key]) for key in expected), name
        steps = [(tmp_path / how / name / "steps.csv").read_text() for how in ("turns", "alone")]
        assert steps[0] == steps[1]


def test_what_a_caller_draws_between_epochs_changes_nothing(tmp_path: Path) -> None:
    alone, disturbed = (make_trainer("epochs", tmp_path / name) for name in ("alone", "disturbed"))
    alone.fit()
    for _ in disturbed.epochs():
        torch.rand(3)
    expected = alone.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in disturbed.model.state_dict().items())


def test_handlers_are_as_before_between_and_after_epochs(tmp_path: Path) -> None:
    before, during = handlers(), list[list[Any]]()
    listener = Listener(2, lambda: during.append(handlers()))
    one = make_trainer("epochs", tmp_path / "one", epochs=1, reporter=listener).epochs()
    other = make_trainer("epochs", tmp_path / "other", epochs=2, reporter=listener).epochs()
    for run in (one, other, one, other, other):
        next(run, None)
        assert handlers() == before
    assert len(during) == 2
    assert all(noted != was for seen in during for noted, was in zip(seen, before, strict=True))


# of nine steps, three an epoch
@pytest.mark.parametrize("step", [4, 6, 9], ids=["inside-an-epoch", "at-its-end", "at-the-last"])
def test_a_signal_ends_runs_in_turns_with_a_checkpoint(step: int, tmp_path: Path) -> None:
    before = handlers()
    run = make_trainer("epochs", tmp_path / "run", reporter=Listener(step, interrupt))
    other = make_trainer("epochs", tmp_path / "other", epochs=5)
    with pytest.raises(Interrupted, match=f"the checkpoint of step {step} is in"):
        take_turns(run.epochs(), other.epochs())
    found = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert found is not None
    assert found[0] == step
    assert handlers() == before


def test_a_signal_between_epochs_acts_at_once(tmp_path: Path) -> None:
    run = make_trainer("epochs", tmp_path).epochs()
    next(run)
    with pytest.raises(KeyboardInterrupt) as raised:
        interrupt()
    assert not isinstance(raised.value, Interrupted)
    run.close()
