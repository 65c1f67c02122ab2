"""Two processes give the curve and the weights of one."""

import csv
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.transfer.training.checkpoint import Checkpoints
from tests.cases import cases
from tests.training_processes import main

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2"],
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def launch(launcher: str, *arguments: object) -> int:
    command = [sys.executable, "-m", *LAUNCHERS[launcher]]
    command += [f"--main_process_port={free_port()}"] if launcher == "accelerate" else []
    command += ["-m", "tests.training_processes"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True)
    sys.stderr.write(done.stderr.decode()[-4000:])
    return done.returncode


def curve(output: Path) -> torch.Tensor:
    with (output / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("loss", "lr", "gradient_norm")
    return torch.tensor([[float(row[name]) for name in names] for row in rows], dtype=torch.float64)


def state(output: Path) -> dict[str, Any]:
    found = Checkpoints(output / "checkpoints").latest()
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    main(output, "ddp")
    return output


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """What two processes wrote, by launcher and sharding; each pair runs once."""

    @functools.cache
    def launched(launcher: str, sharding: str) -> Path:
        output = tmp_path_factory.mktemp("together")
        assert launch(launcher, output, sharding) == 0
        return output

    return launched


@pytest.mark.parametrize(
    ("launcher", "sharding"), cases([("torchrun", "fsdp2")], [("torchrun", "ddp"), ("accelerate", "fsdp2")])
)
def test_two_processes_give_the_curve_of_one(
    alone: Path, together: Callable[[str, str], Path], launcher: str, sharding: str
) -> None:
    output, expected = together(launcher, sharding), curve(alone)
    assert len(expected) == 9
    torch.testing.assert_close(curve(output), expected, rtol=1e-5, atol=1e-6)
    for name, weight in state(alone)["engine"]["weights"].items():
        torch.testing.assert_close(state(output)["engine"]["weights"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("sharding", ["fsdp2", "ddp"])
def test_two_processes_go_on_after_a_kill(
    together: Callable[[str, str], Path], tmp_path: Path, sharding: str
) -> None:
    output = together("torchrun", sharding)
    assert launch("torchrun", tmp_path, sharding, 5) != 0
    assert len(curve(tmp_path)) < 9
    assert launch("torchrun", tmp_path, sharding) == 0
    assert torch.equal(curve(output), curve(tmp_path))
    whole, killed = (state(folder)["engine"]["weights"] for folder in (output, tmp_path))
    for name, weight in whole.items():
        assert torch.equal(weight, killed[name]), name


def test_more_processes_than_examples_in_a_batch_are_refused(tmp_path: Path) -> None:
    from tests.training_runs import make_trainer

    with pytest.raises(ValueError, match="batch_size of at least 9 for 1 processes with accumulation 9"):
        make_trainer("epochs", tmp_path, accumulation=9)
