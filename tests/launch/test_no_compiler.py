"""A GPU, but no C compiler, with which Triton builds what launches its kernels: as in slim images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="launches need Triton")

ROOT = Path(__file__).parents[2]
# torch believes in a GPU; Triton's driver is its own, and asks for a compiler as it does anywhere
CALLS = """
import warnings
from pathlib import Path
import torch
import fastlora
from fastlora.cli.doctor import _devices, _problem
from tests.launch.stage import Stage

Stage("sm_90", Path("."))._deceive_torch()
torch.cuda.get_device_name = lambda *device: "NVIDIA H100 80GB HBM3"
x, weight, a, b = torch.ones(4, 32), torch.ones(16, 32), torch.ones(2, 32), torch.ones(16, 2)
warnings.simplefilter("always")
for _ in range(3):
    y = fastlora.functional.lora_linear(x, weight, None, a, b, scaling=0.5)
    z = fastlora.functional.adapter(x, torch.ones(16, 32), None, torch.ones(32, 16), None)
print(y.unique().tolist())
fastlora.set_backend("triton")
try:
    fastlora.functional.lora_linear(x, weight, None, a, b, scaling=0.5)
except ValueError as error:
    print(error)
print(_problem())
print([device["auto"] for device in _devices()], _devices()[-1]["kernels"])
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux")
def test_library_products_take_over_and_say_so_once(tmp_path: Path) -> None:
    # the folder is empty: a driver that was built before would do, and CUDA's is not looked for
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")
    }
    environment |= {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CALLS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    computed, refused, problem, doctor = done.stdout.splitlines()
    # 32 + 0.5 · 32 · 2
    assert computed == "[64.0]"
    assert done.stderr.count("uses library products instead") == 1
    assert "Failed to find C compiler" in done.stderr
    for said in (refused, problem):
        assert said.startswith("backend 'triton' was asked for")
        assert "needs a C compiler, gcc for instance" in said
    assert doctor.startswith("['torch', 'torch', 'torch'] ")
    assert "Failed to find C compiler" in doctor
