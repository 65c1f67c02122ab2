"""Run a module of the tests where Triton compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]


def told_by(module: str, *arguments: str) -> Any:
    """What ``python -m module`` prints, which is JSON.

    In a process of its own: Triton's interpreter, which other tests run in, and its compiler can't share one.

    Args:
        module: Its name.
        arguments: Of its command line.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
