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

ROOT = Path(__file__).parents[1]
SHORT = {
    "news_with_trainer.py": ["--max-steps", "2", "--articles", "40"],
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
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *SHORT[name]],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = re.findall(
        r"^(PEFT|PEFT, accelerated|fastlora): [\d.]+ s a step, [\d.]+% right$", done.stdout, re.M
    )
    assert len(told) == 2
    assert told[0] == "PEFT"
