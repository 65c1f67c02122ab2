"""The examples run, a few steps each, and end with a line for each candidate."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = {
    "news_with_trainer.py": ["--max-steps", "2", "--articles", "40"],
    "digits_with_lightning.py": ["--max-steps", "2"],
    "solar_cells_with_timm.py": ["--steps", "2"],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_an_example_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *SHORT[name]],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = re.findall(
        r"^(PEFT|PEFT, accelerated|fastlora): [\d.]+ s a step, [\d.]+% right$", done.stdout, re.M
    )
    assert len(told) == 2
    assert told[0] == "PEFT"
