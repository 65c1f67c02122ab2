"""Run a module of the tests in several processes, as a user would with torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from fastlora.transfer.training.processes import leave_processes

ROOT = Path(__file__).parents[1]


def in_two_processes(module: str, *arguments: str) -> None:
    """Run ``python -m module`` twice under torchrun; both have to succeed."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def leave() -> NoReturn:
    """End a process of several that has done its work, its process group first.

    At once: threads of torch's own (FSDP2 on gloo) now and then abort an interpreter that shuts down.
    """
    leave_processes()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
