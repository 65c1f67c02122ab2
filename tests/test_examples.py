"""The examples run, a few steps each, and end with a line for each candidate."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cases import cases
from tests.chat_models import save_tiny

ROOT = Path(__file__).parents[1]
SHORT = {
    "news_with_trainer.py": ["--max-steps", "2", "--articles", "40"],
    "chat_with_trl.py": ["--steps", "4", "--tokens", "256"],
    "digits_with_lightning.py": ["--max-steps", "2"],
    "solar_cells_with_timm.py": ["--steps", "2"],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SHORT)


@pytest.mark.parametrize(("name", "machines"), [("one_node", 1), ("several_nodes", 2)])
def test_a_configuration_is_read_by_accelerate(name: str, machines: int) -> None:
    # has no types
    config_args: Any = importlib.import_module("accelerate.commands.config.config_args")
    found = config_args.load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert found.num_machines == machines
    assert found.num_processes == 8 * machines
    assert found.mixed_precision == "bf16"


@pytest.mark.parametrize(
    "name", cases(["solar_cells_with_timm.py"], ["news_with_trainer.py", "digits_with_lightning.py"])
)
def test_an_example_runs(name: str) -> None:
    printed = _run(name)
    told = re.findall(r"^(PEFT|PEFT, accelerated|fastlora): [\d.]+ s a step, [\d.]+% right$", printed, re.M)
    assert len(told) == 2
    assert told[0] == "PEFT"


def test_the_example_of_trl_runs_and_both_learn_alike(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    printed = _run("chat_with_trl.py", "--model", str(tmp_path))
    line = r"^(.+): [\d.]+ s a step, ([\d.]+) MiB at most, loss ([\d.]+) → ([\d.]+), (\d+) layers fused$"
    (name, memory, first, last, fused), ours = re.findall(line, printed, re.M)
    assert (name, ours[0]) == ("PEFT", "PEFT, accelerated")
    # seven layers of each of two blocks
    assert (fused, ours[4]) == ("0", "14")
    # a row's activations of one layer, at least
    assert min(float(memory), float(ours[1])) > 256 * (64 + 128 + 128) * 4 / 2**20
    assert float(last) < float(first)
    assert [float(loss) for loss in ours[2:4]] == pytest.approx([float(first), float(last)], abs=0.002)


def test_too_few_steps_are_refused() -> None:
    command = [sys.executable, str(ROOT / "examples" / "chat_with_trl.py"), "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected --steps of at least 4, got 3" in done.stderr


def _run(name: str, *arguments: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *SHORT[name], *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
