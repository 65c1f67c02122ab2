"""The dropout mask as Triton's interpreter draws it on a CPU: numbers that no compiler has touched."""

import json
import subprocess
import sys
from dataclasses import asdict

import torch
from torch import Tensor

from fastlora._core.backend import interpreter_environment
from fastlora.tuning.calls import LayerCall
from fastlora.tuning.candidates import draw, run_forward
from fastlora_kernels.choose.tuned import Choice

_SECONDS = 60
_SCRIPT = """
import sys
sys.path[:] = {path!r}
from {module} import print_mask
print_mask({call!r})
"""


def mask_by_interpreter(call: LayerCall) -> Tensor:
    """Words of a call's mask ``[rows, ⌈inputs / 32⌉]``, on the CPU.

    Raises:
        RuntimeError: The interpreter fails here, as some versions of Triton's do with some of NumPy.
    """
    script = _SCRIPT.format(path=sys.path, module=__name__, call=json.dumps(asdict(call)))
    # the interpreter can't share a process with the compiler
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=interpreter_environment(),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    if ran.returncode:
        raise RuntimeError(f"Triton's interpreter failed: {ran.stderr.strip().splitlines()[-1]}")
    return torch.tensor(json.loads(ran.stdout), dtype=torch.int32)


def print_mask(call: str) -> None:
    """Print the words as JSON, for a call's fields in JSON."""
    mask = run_forward(draw(LayerCall(**json.loads(call)), torch.device("cpu")), Choice("split"))[2]
    assert mask is not None
    print(json.dumps(mask.tolist()))
