"""The package as a whole: imports, layout, and what the README promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.code_blocks import blocks, run, stand_in

ROOT = Path(__file__).parents[1]
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import importlib.util, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import fastlora
layer = fastlora.LoRALinear(8, 4, rank=2, dropout=0.1)
layer(torch.randn(3, 8)).sum().backward()
assert layer.lora_B.grad.abs().sum() > 0
assert not any(name.startswith("fastlora_kernels.lora") for name in sys.modules)
from fastlora_kernels.choose.explain import explain
from fastlora_kernels.targets import find_card
from fastlora_kernels.tile import Shape
assert explain("lora_linear", Shape(8192, 4096, 4096, 16), torch.bfloat16, find_card("H100")).tile
try:
    with fastlora.use_backend("triton"):
        layer(torch.randn(3, 8))
except ValueError as error:
    print(error)
"""


# what a GPU's image may lack: all that a command, a report, pictures or another library's layers need
WITHOUT_EXTRAS = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder
lacking = (
    "torchvision PIL matplotlib jinja2 typer rich tomli_w packaging platformdirs peft timm transformers "
    "accelerate torchao bitsandbytes sklearn scipy onnx onnxruntime tensorboard lightning pytest"
).split()
find = PathFinder.find_spec
hidden = lambda name, *rest: None if name.split(".")[0] in lacking else find(name, *rest)
PathFinder.find_spec = staticmethod(hidden)
import fastlora, fastlora_kernels, torch
for name in fastlora.__all__:
    getattr(fastlora, name)
rooms = "_core ops together nn anatomy inject parameters init state interop distributed tuning".split()
names = ["fastlora_kernels", *(f"fastlora.{room}" for room in rooms)]
for package in map(importlib.import_module, names):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # PEFT's layers are known by their classes
        if not module.name.startswith("fastlora.interop._peft"):
            importlib.import_module(module.name)
layer, adapter = fastlora.LoRALinear(32, 16, rank=2, dropout=0.1), fastlora.AdapterLayer(16, 16)
adapter(layer(torch.randn(3, 32))).sum().backward()
assert layer.lora_B.grad.abs().sum() > 0
model = fastlora.apply_lora(torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 4)))
fastlora.save_adapter(model, FOLDER)
fastlora.load_adapter(model, FOLDER)
print(fastlora.parameter_report(model))
print([name for name in lacking if name in sys.modules])
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_runs_and_plans_without_triton() -> None:
    assert "the package triton is not installed" in run_python(WITHOUT_TRITON)


@pytest.mark.full
def test_layers_and_ops_need_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    """Every public name too, and every module of the rooms that hold no command and no report."""
    printed = run_python(WITHOUT_EXTRAS.replace("FOLDER", repr(str(tmp_path))))
    assert "of 1,684 parameters train" in printed
    assert printed.splitlines()[-1] == "[]"


def test_import_is_lazy() -> None:
    """``import fastlora`` loads neither the kernels nor what only the commands need."""
    heavy = "('torch', 'triton', 'fastlora_kernels', 'matplotlib', 'torchvision', 'peft', 'rich')"
    loaded = run_python(f"import fastlora, sys; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"
    slow = "('matplotlib', 'torchvision', 'accelerate')"
    loaded = run_python(f"import fastlora.cli, sys; print([name for name in {slow} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_kernels_folder_never_becomes_a_package() -> None:
    """Hugging Face publishes a package called ``kernels``, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [path for top in ("tests", "benchmarks") for path in (ROOT / top).rglob("kernels")]
    found = run_python(
        "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    )
    assert str(ROOT / "kernels") not in found


def test_kernels_do_not_import_fastlora() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) fastlora\b", path.read_text(), re.M), path
    reference = (ROOT / "fastlora" / "reference.py").read_text()
    assert "fastlora_kernels" not in reference


def test_only_one_file_reads_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fastlora").rglob("*.py")
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    }
    # the demo sets how much torch's profiler says, which has to stand before torch is imported
    assert readers == {"fastlora/_core/backend.py", "fastlora/cli/demo.py"}


# what begins so says what an argument is only to who has read another line
POINTERS = "As above|As for|As in|As the|As with|Ditto|Its|Likewise|Of|See|Theirs?|The same|Those|Whose"
POINTS_ELSEWHERE = re.compile(rf"^ +[a-z_]\w*: (?:{POINTERS})\b.*$", re.M)


def test_every_argument_says_what_it_is() -> None:
    pointing = {
        str(path.relative_to(ROOT)): lines
        for top in ("fastlora", "kernels")
        for path in (ROOT / top).rglob("*.py")
        if (lines := [line.strip() for line in POINTS_ELSEWHERE.findall(path.read_text())])
    }
    assert pointing == {}


EXAMPLES = blocks(ROOT / "README.md")


@pytest.mark.parametrize("example", EXAMPLES, ids=["peft", "lora"])
def test_readme_example_runs(
    example: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch)
    run(example, "README.md", {}, capsys)


def test_an_absent_optional_package_skips_its_files_alone(tmp_path: Path) -> None:
    """Its error would stop every other test, as other packages' and those of parts that one lacks do."""
    # one package as on a machine without it, and one that is there
    (tmp_path / "hidden.py").write_text('import sys\nsys.modules["onnxruntime"] = None')
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").touch()
    (tmp_path / "test_optional.py").write_text("import onnxruntime.capi")
    (tmp_path / "test_part.py").write_text("import peft.no_such_part")
    (tmp_path / "test_own.py").write_text("import no_such_package")
    command = [
        "-m",
        "pytest",
        "-p",
        "hidden",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "-rs",
        "--collect-only",
        "-c",
        os.devnull,
    ]
    done = subprocess.run(
        [sys.executable, *command, f"--rootdir={tmp_path}", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert "onnxruntime is not installed" in done.stdout
    assert "No module named 'peft.no_such_part'" in done.stdout
    assert "No module named 'no_such_package'" in done.stdout
    assert "2 errors" in done.stdout
    assert "1 skipped" in done.stdout


def test_what_runs_on_a_card_is_marked(kernel_device: object, request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("gpu") is not None


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_backend_with_kernels_is_marked(backend: str, request: pytest.FixtureRequest) -> None:
    assert (request.node.get_closest_marker("gpu") is not None) == (backend == "triton")
