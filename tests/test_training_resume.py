"""A run killed at any step and resumed ends as the undisturbed one, bit for bit."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.transfer.training import Trainer
from fastlora.transfer.training.checkpoint import Checkpoints
from tests.training_runs import RUNS, make_net, make_trainer, pictures, run

ROOT = Path(__file__).parents[1]


def final_state(output: Path) -> Any:
    """The last checkpoint without its timings, and the model."""
    found = Checkpoints(output / "checkpoints").latest()
    assert found is not None
    step, state = found
    for record in [state["progress"], *state["progress"]["history"]]:
        del record["seconds"]
    return step, state, torch.load(output / "model.pt", weights_only=True)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}/{index}")
    else:
        assert one == other, where


def logged_steps(output: Path) -> list[str]:
    return (output / "steps.csv").read_text().splitlines()


# by default reported/test_runs_stopped stops a run, and test_domain_training resumes one of two domains
@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_any_step_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tests.training_runs", name, str(tmp_path)], cwd=ROOT, check=True)
    whole, steps = final_state(tmp_path / "whole"), logged_steps(tmp_path / "whole")
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == len(steps) - 1 >= 4
    for output in killed:
        assert_same(whole, final_state(output), output.name)
        assert logged_steps(output) == steps


def test_a_finished_run_resumed_trains_nothing_and_gives_the_same(tmp_path: Path) -> None:
    first = run("epochs", tmp_path)
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    again = run("epochs", tmp_path, resume=True)
    assert again.resumed_at == first.steps == again.steps
    assert again.history == first.history
    assert_same(weights, torch.load(tmp_path / "model.pt", weights_only=True))


def test_workers_change_nothing(tmp_path: Path) -> None:
    results: list[Any] = []
    for workers in (0, 2):
        trainer = make_trainer("epochs", tmp_path / str(workers), workers=workers)
        trainer.fit()
        results.append(trainer.model.state_dict())
    assert_same(*results)


def test_a_torn_checkpoint_is_skipped_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    run("mid-epoch", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    newest = sorted((tmp_path / "torn/checkpoints").iterdir())[-1] / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "fastlora"):
        result = run("mid-epoch", tmp_path / "torn", resume=True)
    assert str(newest.parent) in caplog.text
    assert "skipped" in caplog.text
    assert result.resumed_at == 8
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "torn"))


def test_all_checkpoints_torn_is_an_error(tmp_path: Path) -> None:
    run("epochs", tmp_path)
    for state in tmp_path.glob("checkpoints/*/state.pt"):
        state.write_bytes(b"")
    with pytest.raises(ValueError, match=r"all 2 are damaged; start again in another folder"):
        run("epochs", tmp_path, resume=True)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run("epochs", tmp_path)
    before = final_state(tmp_path)
    with pytest.raises(ValueError, match=r"has one at step 9; resume it"):
        run("epochs", tmp_path)
    assert_same(before, final_state(tmp_path))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr": 0.5}, r"lr was 0.02, is 0.5 now"),
        ({"batch_size": 4, "epochs": 7}, r"epochs was 3, is 7 now; batch_size was 8, is 4 now"),
        ({"seed": 1}, r"seed was 0, is 1 now"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    run("epochs", tmp_path)
    with pytest.raises(ValueError, match=told):
        make_trainer("epochs", tmp_path, **changes).fit(resume=True)


def test_other_frozen_weights_pictures_or_parts_are_refused(tmp_path: Path) -> None:
    settings = make_trainer("epochs", tmp_path / "unused")._settings

    def fit(net: Any, train: Any, *, resume: bool = True) -> None:
        Trainer(net, train, pictures(), settings, output=tmp_path / "run").fit(resume=resume)

    fit(make_net(trained_stages=1), pictures(), resume=False)
    with pytest.raises(ValueError, match="the frozen weights differ"):
        fit(make_net(trained_stages=1, seed=5), pictures())
    with pytest.raises(ValueError, match="another model, strategy or rank"):
        fit(make_net(trained_stages=2), pictures())
    with pytest.raises(ValueError, match="training pictures, their labels or their order differ"):
        fit(make_net(trained_stages=1), pictures().subset(range(20)))
    fit(make_net(trained_stages=1), pictures())


def test_what_does_not_change_the_result_may_change(tmp_path: Path) -> None:
    make_trainer("epochs", tmp_path, workers=1).fit()
    make_trainer("epochs", tmp_path, workers=0, checkpoint_every=1).fit(resume=True)
