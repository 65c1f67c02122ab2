"""``fastlora tune``: which calls a model or a file names, what the command keeps, shows and tells."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastlora.cli import app, tune
from fastlora.ops import tuned_file
from fastlora.transfer.models.weightless import ModelSpec, build, sample_input
from fastlora.tuning import search, timing
from fastlora.tuning.calls import LayerCall, calls_of_model, read_calls
from fastlora_kernels.choose.tuned import Record
from tests.tuning_models import CALL, GPU, device, pretend, record
from tests.tuning_timers import counting_timer

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def test_calls_of_a_model_include_its_attention() -> None:
    spec = ModelSpec("vit_b_16", None, "bfloat16", batch_size=2)
    model = build(spec)
    calls = calls_of_model(model, sample_input(spec, model), rank=8, dropout=0.1, dtype="bfloat16")
    rows = 2 * 197
    alone = [call for call in calls if isinstance(call, LayerCall)]
    assert alone == calls
    sizes = {(call.rows, call.inputs, call.outputs) for call in alone}
    assert sizes == {
        (rows, 768, 2304),
        (rows, 768, 768),
        (rows, 768, 3072),
        (rows, 3072, 768),
    }
    assert {(call.rank, call.dropout, call.dtype) for call in alone} == {(8, 0.1, "bfloat16")}


def test_calls_say_how_weights_are_stored() -> None:
    layer, batch = torch.nn.Sequential(torch.nn.Linear(32, 48)), torch.zeros(5, 32)
    noted: Any = {"rank": 4, "dropout": 0.0, "dtype": "float16"}
    calls = calls_of_model(layer, batch, **noted, weight="fp8")
    assert calls == [LayerCall(5, 32, 48, 4, 0.0, "float16", "fp8")]
    unknown: Any = "nf5"
    with pytest.raises(ValueError, match="expected a weight out of nf4, int8, fp8, fp8-rows, got 'nf5'"):
        replace(CALL, weight=unknown)


def test_calls_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{"rows": 8, "inputs": 16, "outputs": 32, "dropout": 0.1}]))
    assert read_calls(path) == [LayerCall(8, 16, 32, dropout=0.1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON list such as .*expected JSON in"),
        ("{}", "got dict"),
        ("[]", "expected a JSON list"),
        ('[{"rows": 8, "inputs": 16}]', "expected outputs in entry 1"),
        ('[{"row": 8}]', "did you mean 'rows'.* in entry 1"),
        (
            '[{"rows": 0, "inputs": 16, "outputs": 32}]',
            "entry 1 .*rows to be a whole number of at least 1, got 0",
        ),
        ('[{"rows": 8, "inputs": 16, "outputs": 32, "dtype": "int8"}]', "dtype out of float32.*got 'int8'"),
        ('[{"rows": 8, "inputs": 16, "outputs": 32, "dropout": 1}]', r"in \[0, 1\), got 1"),
        ("[8]", "expected an object as entry 1"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_calls(path)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_gpu")
def test_the_command_needs_a_gpu() -> None:
    result = CliRunner().invoke(app, ["tune", "--model", "vit_b_16"])
    assert result.exit_code == 1
    assert "there is none here; fastlora plan predicts" in result.stderr


@pytest.mark.usefixtures("card")
def test_the_command_measures_keeps_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command on the interpreter: one call that kernels serve, one whose sizes they don't."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_device", device)
    monkeypatch.setattr(tuned_file, "gpu_key", lambda device: GPU)
    monkeypatch.setattr(timing, "gpu_timer", lambda device: counting_timer(1000, -1, from_host=-1))
    calls = [
        {"rows": 20, "inputs": 32, "outputs": 48, "dtype": "float16"},
        {"rows": 4, "inputs": 5, "outputs": 6},
    ]
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps(calls))
    runner = CliRunner(env={"COLUMNS": "200"})
    measured = runner.invoke(app, ["tune", "--shapes", str(shapes), "--json"])
    assert measured.exit_code == 0, measured.output
    assert "4 × 5 × 6, rank 16: always takes library products, not tuned" in measured.stderr
    (record,) = json.loads(measured.stdout)
    assert record["shape"]["m"] == 20
    shown = runner.invoke(app, ["tune", "--show"])
    assert shown.exit_code == 0, shown.output
    assert "20 × 32 × 48" in shown.stdout
    assert record["forward"]["path"] in shown.stdout
    shapes.write_text(json.dumps(calls[1:]))
    refused = runner.invoke(app, ["tune", "--shapes", str(shapes)])
    assert refused.exit_code == 2
    assert "multiples of 16" in refused.stderr


@pytest.mark.usefixtures("card")
def test_the_command_goes_on_after_a_call_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_device", device)
    monkeypatch.setattr(tuned_file, "gpu_key", lambda device: GPU)
    monkeypatch.setattr(timing, "gpu_timer", lambda device: counting_timer(1, 1))

    def tune_call(call: LayerCall, *more: Any) -> tuple[Record | None, list[search.LeftOut]]:
        if call.rows == 20:
            return None, [search.LeftOut("everything", "CompilationError: no such name", wrong=True)]
        return record(call), []

    monkeypatch.setattr(search, "tune_call", tune_call)
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps([{"rows": rows, "inputs": 32, "outputs": 48} for rows in (20, 40)]))
    result = CliRunner().invoke(app, ["tune", "--shapes", str(shapes), "--json"])
    assert result.exit_code == 1
    assert "left out: 20 × 32 × 48: everything: CompilationError: no such name" in result.stderr
    assert [each["shape"]["m"] for each in json.loads(result.stdout)] == [40]
