"""The examples run, a few steps each, and end with a line for each candidate."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlora.transfer.demo.language.dialogues import corpus_folder, load_dialogues
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


# by default TRL's stands for them
@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in SHORT if name != "chat_with_trl.py"])
def test_an_example_runs(name: str) -> None:
    printed = _run(name)
    told = re.findall(r"^(PEFT|PEFT, accelerated|fastlora): [\d.]+ s a step, [\d.]+% right$", printed, re.M)
    assert len(told) == 2
    assert told[0] == "PEFT"


@pytest.mark.full
def test_the_example_of_trl_runs_and_both_learn_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # so wide that a block's activations are more than TRL's loss takes
    save_tiny(tmp_path, intermediate_size=8192)
    printed, trainers = _run_chat(tmp_path, monkeypatch, capsys)
    line = r"^(.+): ([\d.]+) s a step, ([\d.]+) MiB at most, loss ([\d.]+) → ([\d.]+), (\d+) layers fused$"
    (name, seconds, memory, first, last, fused), ours = re.findall(line, printed, re.M)
    assert (name, ours[0]) == ("PEFT", "PEFT, accelerated")
    # seven layers of each of two blocks
    assert (fused, ours[5]) == ("0", "14")
    assert min(float(seconds), float(ours[1])) > 0
    # of gate, act(gate), up and their product one keeps two
    assert float(ours[2]) < 0.9 * float(memory)
    assert float(last) < float(first)
    assert [float(loss) for loss in ours[3:5]] == pytest.approx([float(first), float(last)], abs=0.002)
    # half the steps and the other half, then one that is measured; every forward pass is repeated
    assert [trainer.passes for trainer in trainers] == [2 * 2, 2 * (2 + 1)] * 2
    dialogues = len(load_dialogues(corpus_folder()))
    for trainer in trainers:
        lengths = trainer.train_dataset["seq_lengths"]
        assert sum(map(len, lengths)) == dialogues > len(lengths)


def _run_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, list[Any]]:
    """What the example of TRL prints, and its trainers, which count passes through the first block."""
    spec = importlib.util.spec_from_file_location("chat_with_trl", ROOT / "examples" / "chat_with_trl.py")
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    begin, trainers = example.begin, list[Any]()

    def watched(*given: Any) -> Any:
        trainer = begin(*given)
        trainer.passes = 0

        def count(*_: Any) -> None:
            trainer.passes += 1

        trainer.model.get_submodule("base_model.model.model.layers.0.input_layernorm").register_forward_hook(
            count
        )
        trainers.append(trainer)
        return trainer

    monkeypatch.setattr(example, "begin", watched)
    monkeypatch.setattr(sys, "argv", ["chat_with_trl.py", *SHORT["chat_with_trl.py"], "--model", str(folder)])
    example.main()
    return capsys.readouterr().out, trainers


@pytest.mark.full
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
