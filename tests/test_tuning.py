"""``tune``: which calls, every candidate checked and timed, the fastest taken by the op."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import fastlora
from fastlora.cli import app, tune
from fastlora.functional import lora_linear
from fastlora.ops import kernel_paths, lora_torch, lora_triton, tuned_file
from fastlora.transfer.models.weightless import ModelSpec
from fastlora.tuning import search, timing
from fastlora.tuning.calls import LayerCall, calls_of_model, read_calls
from fastlora.tuning.candidates import choices, draw, run_forward
from fastlora.tuning.search import name_of
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.lora.forward import lora_forward
from tests.tuning_models import CALL, GPU, device, pretend, record

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def counting_timer(first: float, step: float) -> Callable[[Callable[[], object]], float]:
    """Later candidates take longer, or shorter with a negative step; the work is done all the same."""
    times = itertools.count(first, step)

    def time(work: Callable[[], object]) -> float:
        work()
        return next(times)

    return time


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_candidate_is_checked_and_timed(dropout: float) -> None:
    call = replace(CALL, dropout=dropout)
    told: list[str] = []
    found, left_out = search.tune_call(call, device(), counting_timer(1, 1), told.append)
    assert left_out == []
    for part in ("forward", "backward"):
        wanted = [name_of(choice) for choice in choices(part, call, device())]
        assert list(found.microseconds[part]) == wanted
        assert len(wanted) >= 4
    assert told[-1] == "eager"
    # the first of each pass was the fastest, and both together faster than eager
    assert found.forward == choices("forward", call, device())[0]
    assert found.microseconds["step"]["eager"] > found.microseconds["step"]["fused"]


@pytest.mark.usefixtures("card")
def test_eager_wins_where_it_is_faster() -> None:
    """The last timed is the fastest: eager. The op then runs the eager formula for this call."""
    found, _ = search.tune_call(CALL, device(), counting_timer(1000, -1), lambda what: None)
    assert found.forward == found.backward == Choice(tuned.REFERENCE)
    tuned.pin(GPU, [found])
    assert kernel_paths.prefers_eager(CALL.shape, torch.float16, device(), dropping=False)


@pytest.mark.usefixtures("card")
def test_a_wrong_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, *rest: Any, **more: Any) -> None:
        lora_forward(x * 1.05, *rest, **more)

    monkeypatch.setattr(lora_triton, "lora_forward", wrong)
    found, left_out = search.tune_call(CALL, device(), counting_timer(1, 1), lambda what: None)
    assert all(each.wrong and "where eager errs by" in each.reason for each in left_out)
    assert {each.candidate.split()[1] for each in left_out} == {"split"}
    assert found.forward.path != "split"


def noting(function: Callable[..., Any], name: str, ran: list[str]) -> Callable[..., Any]:
    def run(*arguments: Any, **more: Any) -> Any:
        ran.append(name)
        return function(*arguments, **more)

    return run


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("path", ["single", "epilogue", "library"])
def test_the_op_takes_what_is_pinned_or_handed_down(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora._core.backend._automatic", lambda device, dtype: "triton")
    t = draw(CALL, device())
    ran: list[str] = []
    modules = {"single_forward": lora_triton, "epilogue_forward": lora_triton, "forward": lora_torch}
    for name, module in modules.items():
        monkeypatch.setattr(module, name, noting(getattr(module, name), name, ran))
    taken = "forward" if path == "library" else f"{path}_forward"
    tuned.pin(GPU, [record(path=path)])
    lora_linear(t.x, t.weight, t.bias, t.lora_A, t.lora_B, scaling=2.0)
    assert ran == [taken]
    tuned.pin(GPU, [])
    run_forward(t, Choice(path))
    assert ran == [taken, taken]


@pytest.mark.usefixtures("card")
def test_the_kernels_asked_for_by_name_never_leave_to_the_library() -> None:
    tuned.pin(GPU, [record(path="library")])
    arguments = ("forward", CALL.shape, torch.float16, device())
    with fastlora.use_backend("triton"):
        assert kernel_paths.choose(*arguments, dropping=False).path == "split"  # type: ignore[arg-type]
    with fastlora.use_backend("auto"):
        assert kernel_paths.choose(*arguments, dropping=False).path == "library"  # type: ignore[arg-type]


def test_calls_of_a_model_include_its_attention() -> None:
    spec = ModelSpec("vit_b_16", None, "bfloat16", batch_size=2)
    calls = calls_of_model(spec, rank=8, dropout=0.1, dtype="bfloat16")
    rows = 2 * 197
    sizes = {(call.rows, call.inputs, call.outputs) for call in calls}
    assert sizes == {
        (rows, 768, 2304),
        (rows, 768, 768),
        (rows, 768, 3072),
        (rows, 3072, 768),
    }
    assert {(call.rank, call.dropout, call.dtype) for call in calls} == {(8, 0.1, "bfloat16")}


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
    monkeypatch.setattr(timing, "graph_timer", lambda device: counting_timer(1, 1))
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
