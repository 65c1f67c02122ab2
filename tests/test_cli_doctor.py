"""``fastlora doctor``: what it finds, and how it ends."""

import importlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import fastlora
from fastlora.cli import app, doctor
from fastlora.cli._console import make_console
from fastlora.ops.weights.four_bit import FourBitWeight


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["doctor", *arguments])


def test_json() -> None:
    result = run("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["devices"][0]["device"] == "cpu"
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["problem"] == ""


@pytest.fixture
def another_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A torchvision that fails as one of another torch does, and what is told of it."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    return (
        f"torchvision {metadata.version('torchvision')} was built for another torch than {torch.__version__}"
    )


def test_a_torchvision_of_another_torch_is_told(another_torch: str) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert another_torch in result.stdout


def test_every_command_tells_it_in_one_line(another_torch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastlora.transfer.places.check_run", lambda run: importlib.import_module("torchvision")
    )
    result = CliRunner().invoke(app, ["export", "run"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {another_torch}")
    assert len(result.stderr.splitlines()) == 1


def test_words_name_what_an_extra_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def without(name: str) -> str:
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "peft" else installed(name)

    monkeypatch.setattr(doctor, "version", without)
    result = run()
    assert result.exit_code == 0, result.output
    assert 'pip install "fastlora-triton[timm]"' in result.stdout
    bound = next(name for name in metadata.requires("fastlora-triton") or () if name[:5] == "peft<")
    assert f"extra peft lacks {bound.split(';')[0]}" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run")
def test_a_backend_that_cannot_run_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora._core.backend.interpreter_enabled", lambda: False)
    with fastlora.use_backend("triton"):
        result = run()
    assert result.exit_code == 1
    assert "serves CUDA tensors, got a tensor on cpu" in result.stderr


def test_a_gpu_with_plans_and_one_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA H100 NVL", 9, 0, 132

    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: Properties.name)
    found = doctor._gpu(torch.device("cuda", 6))
    assert (found["plans"], found["auto"], found["measured"]) == ("as H100 NVL", "triton", 0)
    Properties.major = 7
    assert doctor._gpu(torch.device("cuda", 7))["auto"] == "torch"


def test_where_there_is_a_gpu_its_check_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    devices = [{"device": "cpu", "auto": "torch"}, {"device": "cuda:0", "auto": "triton"}]
    found = doctor.findings() | {"devices": devices}
    doctor._show(found, make_console())
    assert "python -m fastlora.bench.gpu_check" in capsys.readouterr().out
    doctor._show(found | {"devices": devices[:1]}, make_console())
    assert "gpu_check" not in capsys.readouterr().out


def test_four_bits_that_are_decoded_wrongly_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="its values are compared")
    cpu = torch.device("cpu")
    assert doctor._four_bits(cpu) == {"nf4": "right"}
    assert all(device["nf4"] == "right" for device in doctor.findings()["devices"])
    dense = FourBitWeight.dense

    def one_off(weight: FourBitWeight, dtype: torch.dtype) -> torch.Tensor:
        values = dense(weight, dtype)
        values[7, 63] += 1e-6
        return values

    monkeypatch.setattr(FourBitWeight, "dense", one_off)
    assert doctor._four_bits(cpu) == {"nf4": "wrong by the backend torch"}
    monkeypatch.setattr(FourBitWeight, "dense", None)
    assert doctor._four_bits(cpu)["nf4"].startswith("fails: ")
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    assert doctor._four_bits(cpu) == {}
