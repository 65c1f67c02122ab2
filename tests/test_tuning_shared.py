"""``tune`` of layers that share their input: candidates, records, what the op takes and loads for graphs."""

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
from fastlora.functional import Projection, shared_lora_linear
from fastlora.ops import kernel_paths, lora_triton_backward, shared_triton, tuned_file
from fastlora.ops.prepared import Memory
from fastlora.tuning import shared, timing
from fastlora.tuning.calls import LayerCall, SharedCall
from fastlora.tuning.search import name_of
from fastlora.tuning.timing import Times
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Choice, SharedRecord, Winners
from fastlora_kernels.shared.grad_x import shared_grad_x
from fastlora_kernels.tile import Tile
from tests.tuning_models import CALL, GPU, SHARED, SMALL_CARD, device, pretend, record, shared_record

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tile(card: None) -> Tile:
    """Of the launch that computes dX of all layers: the one that there is."""
    first = shared.choices_of(SHARED, device())[0]
    assert (first.path, first.tile is None) == ("shared", False)
    assert first.tile is not None
    return first.tile


def timer() -> timing.Timer:
    """In a graph later work takes longer; from the host it is done sooner."""
    count = iter(range(1, 1000))

    def time(work: Callable[[], object]) -> Times:
        work()
        number = next(count)
        return Times(float(number), 1000.0 - number)

    return time


def tuned_shared(call: SharedCall = SHARED) -> tuple[SharedRecord, list[Any]]:
    found, left_out = shared.tune_shared(call, device(), timer(), lambda what: None)
    assert found is not None
    return found, left_out


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_candidate_is_checked_and_timed(dropout: float) -> None:
    call = SharedCall(tuple(replace(layer, dropout=dropout) for layer in SHARED.layers))
    found, left_out = tuned_shared(call)
    assert left_out == []
    candidates = shared.choices_of(call, device())
    assert [choice.path for choice in candidates] == ["shared", "epilogue", "separate"]
    # together one piece of work is timed both ways; one by one each way takes what won for it
    names = [name_of(choice) for choice in candidates]
    assert found.microseconds["graph"] == dict(zip(names, (1.0, 2.0, 3.0), strict=True))
    assert found.microseconds["host"] == dict(zip(names, (999.0, 998.0, 996.0), strict=True))
    assert (found.in_graph, found.from_host) == (candidates[0], candidates[-1])
    assert (found.shapes, found.dtype, found.dropping) == (call.shapes, "float16", dropout > 0)
    assert tuned.fits(found, SMALL_CARD)


@pytest.mark.usefixtures("card")
def test_a_wrong_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what one layer alone adds to the gradient of x."""

    def wrong(dx: Tensor, *tensors: Tensor, **settings: Any) -> Any:
        changed = [*tensors]
        changed[5] = changed[5] * 1.05
        return shared_grad_x(dx, *changed, **settings)

    monkeypatch.setattr(shared_triton, "shared_grad_x", wrong)
    found, (left_out,) = tuned_shared()
    assert left_out.candidate.startswith("backward shared")
    assert left_out.wrong
    assert "WrongResult: errs by" in left_out.reason
    assert [*found.microseconds["graph"]] == ["epilogue", "separate"]


@pytest.mark.usefixtures("card")
def test_a_call_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shared, "draw", full)
    found, (left_out,) = shared.tune_shared(SHARED, device(), timer(), lambda what: None)
    assert found is None
    assert (left_out.candidate, left_out.wrong) == ("everything", False)


@pytest.mark.usefixtures("card")
def test_one_by_one_each_layer_takes_what_won_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph and from the host."""
    won: dict[str, float] = {}
    host = Winners(Choice("split"), Choice("split"), {"step": won})
    alone = [replace(record(each), backward=Choice("epilogue"), from_host=host) for each in SHARED.layers]
    tuned.pin(GPU, alone)
    ran: list[int] = []
    run = lora_triton_backward._epilogue_grad_x_a

    def noted(dy: Tensor, *rest: Any, **more: Any) -> Any:
        ran.append(dy.shape[1])
        return run(dy, *rest, **more)

    monkeypatch.setattr(lora_triton_backward, "_epilogue_grad_x_a", noted)
    layers = shared.draw_shared(SHARED.layers, device())
    shared.work_of(layers, Choice("separate"))()
    assert ran == []
    shared.work_of(layers, Choice("separate"), in_graph=True)()
    assert ran == [48, 16, 32]


def test_records_of_several_layers_stand_apart(tile: Tile) -> None:
    """Kept in the file of the others, which old ones are without, and found by sizes, order and dropout."""
    mine = shared_record(Choice("shared", tile), Choice("epilogue"))
    masked = shared_record(Choice("separate"), Choice("separate"), dropping=True)
    for each in (mine, record(), masked, mine):
        tuned_file.keep(each, GPU)
    path = tuned_file.path_of(GPU)
    assert tuned_file.read_or_warn(GPU, SMALL_CARD) == [record(), masked, mine]

    def find(*layers: LayerCall, dropping: bool = False) -> SharedRecord | None:
        shapes = SharedCall(layers).shapes
        return tuned.find_shared(GPU, shapes, torch.float16, dropping=dropping)

    q, k, v = SHARED.layers
    assert find(q, k, v) == mine
    assert find(*(replace(each, rows=80) for each in (q, k, v))) == mine
    assert find(*(replace(each, rows=81) for each in (q, k, v))) is None
    assert find(q, k, v, dropping=True) == masked
    assert find(k, q, v) is find(q, k) is find(q, k, replace(v, rank=8)) is None
    assert tuned.find(GPU, q.shape, torch.float16, dropping=False) == record()
    content = json.loads(path.read_text())
    content.pop("shared")
    path.write_text(json.dumps(content))
    assert tuned_file.read_or_warn(GPU, SMALL_CARD) == [record()]


@pytest.mark.parametrize("stale", [Choice("folded"), Choice("epilogue", Tile(64, 64, 64, 16, 4, 3))])
@pytest.mark.usefixtures("card")
def test_a_choice_that_the_plans_do_not_offer_is_not_taken(stale: Choice) -> None:
    tuned_file.keep(shared_record(Choice("epilogue"), stale), GPU)
    with pytest.warns(
        UserWarning, match="1 of 1 choices.*name paths or tiles that the plans for sm_80 don't"
    ):
        assert tuned_file.read_or_warn(GPU, SMALL_CARD) == []


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, card: None) -> list[Any]:
    """What computes dX of several layers at once: its tile, or the path."""
    found: list[Any] = []
    by_library = shared_triton._by_library

    def launch(dx: Tensor, *tensors: Tensor | None, plan: Any) -> Any:
        found.append(plan.tile)
        return shared_grad_x(dx, *tensors, plan=plan)

    def products(*arguments: Any) -> Any:
        found.append("epilogue")
        return by_library(*arguments)

    monkeypatch.setattr(shared_triton, "shared_grad_x", launch)
    monkeypatch.setattr(shared_triton, "_by_library", products)
    return found


def backward(rows: int = CALL.rows) -> None:
    layers = shared.draw_shared([replace(layer, rows=rows) for layer in SHARED.layers], device())
    given = [
        Projection(t.weight, t.bias, t.lora_A.requires_grad_(), t.lora_B.requires_grad_(), 1.0)
        for t in layers
    ]
    with fastlora.use_backend("triton"):
        ys = shared_lora_linear(layers[0].x.requires_grad_(), given)
        torch.autograd.backward(ys, [t.dy for t in layers])


def test_the_op_takes_the_winner_of_the_way_it_runs(
    tile: Tile, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = replace(tile, stages=1)
    assert smaller != tile
    tuned.pin(GPU, [shared_record(Choice("epilogue"), Choice("shared", smaller))])
    monkeypatch.setattr(kernel_paths, "_is_capturing", lambda device: True)
    backward()
    assert launched == ["epilogue"]
    monkeypatch.setattr(kernel_paths, "_is_capturing", lambda device: False)
    Memory.forget_all()
    launched.clear()
    backward()
    assert launched[-1] == smaller


def test_what_a_graph_will_launch_is_loaded_before(tile: Tile, launched: list[Any]) -> None:
    """Once for any number of rows that is compiled alike; the call itself takes what won from the host."""
    tuned.pin(GPU, [shared_record(Choice("epilogue"), Choice("shared", tile))])
    for rows in (33, 35, 37):
        backward(rows)
    assert launched == ["epilogue", tile, tile, tile]
    backward(48)
    assert launched[4:] == ["epilogue", tile]
    tuned.pin(GPU, [shared_record(Choice("shared", tile), Choice("shared", tile))])
    backward(39)
    assert launched[6:] == [tile]


@pytest.mark.usefixtures("card")
def test_the_command_measures_keeps_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer by itself, two that share their input, and four, of which nothing is to be chosen."""
    monkeypatch.setattr(tune, "_device", device)
    monkeypatch.setattr(tuned_file, "gpu_key", lambda device: GPU)
    monkeypatch.setattr(timing, "gpu_timer", lambda device: timer())
    sizes = {"rows": 20, "inputs": 32, "outputs": 48, "dtype": "float16"}
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps([sizes | {"sharing": [48]}, sizes | {"sharing": [48, 48, 48]}]))
    runner = CliRunner(env={"COLUMNS": "200"})
    measured = runner.invoke(app, ["tune", "--shapes", str(shapes), "--json"])
    assert measured.exit_code == 0, measured.output
    assert "20 × 32 × 48 + 48 + 48 + 48, rank 16: no kernel to choose, not tuned" in measured.stderr
    alone, together = json.loads(measured.stdout)
    assert alone["shape"]["n"] == 48
    assert [shape["n"] for shape in together["shapes"]] == [48, 48]
    assert together["from_host"]["path"] == "separate"
    shown = runner.invoke(app, ["tune", "--show"])
    assert shown.exit_code == 0, shown.output
    for part in ("20 × 32 × 48 + 48", "share their input", "separate"):
        assert part in shown.stdout
