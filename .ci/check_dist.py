"""Check what ``make dist`` built: that nothing is missing or too much, and that the wheel runs on its own."""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
# read by tests alone
NOT_INSTALLED = {"fastlora_kernels/compile/counters.csv"}
BESIDE_PACKAGES = {
    *("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"),
    *("fastlora", "fastlora_triton.egg-info", "kernels", "pyproject.toml", "setup.cfg", "setup.py"),
}
LARGEST = 2 * 2**20
# one process, which imports torch once: a layer trains, and commands answer
RUNS = """
import sys
sys.modules["triton"] = None
import fastlora, fastlora_kernels, torch
assert all(module.__file__.startswith(FOLDER) for module in (fastlora, fastlora_kernels))
layer = fastlora.LoRALinear(8, 4, rank=2, dropout=0.1)
layer(torch.randn(3, 8)).sum().backward()
assert layer.lora_B.grad.abs().sum() > 0
from fastlora.cli import main
for line in ("--help", "doctor", "plan --gpu H100 --shape 8192x4096x4096", "params resnet18"):
    sys.argv = ["fastlora", *line.split()]
    try:
        main()
    except SystemExit as done:
        assert not done.code, (line, done.code)
"""


def main() -> None:
    """Check the wheel and the source archive in ``dist/``."""
    (wheel,), (source,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    for built in (wheel, source):
        size = built.stat().st_size
        _expect(size < LARGEST, f"{built.name} of less than {LARGEST:,} bytes, got {size:,}")
    _check_files(wheel, source)
    _run(wheel)
    print(f"{wheel.name} and {source.name} are whole, and the wheel runs")


def _check_files(wheel: Path, source: Path) -> None:
    command = ["git", "ls-files", "fastlora", "kernels/fastlora_kernels"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    tracked = {name.removeprefix("kernels/") for name in listed} - NOT_INSTALLED
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    _expect(packed == tracked, f"the tracked files in {wheel.name}, these differ: {sorted(packed ^ tracked)}")
    with tarfile.open(source) as archive:
        beside = {Path(name).parts[1] for name in archive.getnames() if "/" in name}
    differing = sorted(beside ^ BESIDE_PACKAGES)
    _expect(not differing, f"in {source.name} packages and what describes them, these differ: {differing}")


def _run(wheel: Path) -> None:
    """Install it alone into a folder, and run it with neither Triton nor a compiler on the path."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, str(wheel)]
        subprocess.run(pip, check=True)
        # nothing of the checkout, and no folder with programs
        env = {"PYTHONPATH": folder, "PATH": folder, "HOME": folder}
        command = [sys.executable, "-c", RUNS.replace("FOLDER", repr(folder))]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        _expect(done.returncode == 0, f"the wheel to run, got:\n{done.stdout}{done.stderr}")


def _expect(met: bool, what: str) -> None:
    if not met:
        sys.exit(f"expected {what}")


if __name__ == "__main__":
    main()
