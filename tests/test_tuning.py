"""``tune``: which calls, every candidate checked and timed, the fastest taken by the op."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton.runtime.errors import OutOfResources
from typer.testing import CliRunner

import fastlora
from fastlora.cli import _tuned, app, tune
from fastlora.functional import lora_linear
from fastlora.ops import kernel_paths, lora_torch, lora_triton, tuned_file
from fastlora.ops.weights import decode_triton
from fastlora.transfer.models.weightless import ModelSpec, build, sample_input
from fastlora.tuning import search, timing, truth
from fastlora.tuning.calls import LayerCall, calls_of_model, read_calls
from fastlora.tuning.candidates import choices, draw, run_eager, run_forward
from fastlora.tuning.search import name_of
from fastlora.tuning.timing import Times
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import Choice, Record
from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.quant import kernels as quantised
from fastlora_kernels.tile import Tile
from tests.cases import cases
from tests.tuning_models import CALL, GPU, SMALL_CARD, device, pretend, record

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def counting_timer(first: float, step: float, from_host: float = 0.0) -> timing.Timer:
    """Later candidates take longer, or shorter with a negative step; the work is done all the same.

    Args:
        first: Microseconds of the first.
        step: What each takes more than the one before.
        from_host: What each takes more than the one before where the host launches it.
    """
    times, host = count(first, step), count(1000.0, from_host)

    def time(work: Callable[[], object]) -> Times:
        work()
        return Times(next(times), next(host))

    return time


def tuned_call(call: LayerCall, timer: timing.Timer) -> tuple[Record, list[search.LeftOut]]:
    found, left_out = search.tune_call(call, device(), timer, lambda what: None)
    assert found is not None
    return found, left_out


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_candidate_is_checked_and_timed(dropout: float) -> None:
    call = replace(CALL, dropout=dropout)
    told: list[str] = []
    found, left_out = search.tune_call(call, device(), counting_timer(1, 1), told.append)
    assert left_out == []
    assert found is not None
    for part in ("forward", "backward"):
        wanted = [name_of(choice) for choice in choices(part, call, device())]
        assert list(found.microseconds[part]) == wanted
        assert len(wanted) >= 4
    assert told[-2:] == ["eager", "both passes"]
    # the first of each pass was the fastest
    assert found.microseconds["forward"][wanted[0]] == 1
    assert found.microseconds["step"]["eager"] < found.microseconds["step"]["fused"]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("weight", "dropout"),
    cases(
        [("nf4", 0.0), ("int8", 0.1)],
        [("nf4", 0.1), ("int8", 0.0), *product(("fp8", "fp8-rows"), (0.0, 0.1))],
    ),
)
def test_quantised_layers_are_timed_as_they_run(weight: Any, dropout: float) -> None:
    """By paths over dense rows and by decoding, of 4 bits without dropout; eager would keep W dense."""
    call = replace(CALL, inputs=64, dropout=dropout, weight=weight)
    told: list[str] = []
    with fastlora.use_backend("triton"):
        found, left_out = search.tune_call(call, device(), counting_timer(1, 1), told.append)
    assert left_out == []
    assert found is not None
    assert (found.weight, "eager" in told, [*found.microseconds["step"]]) == (weight, False, ["fused"])
    decoding = [name for name in found.microseconds["forward"] if name.startswith("decode")]
    without = {"nf4": 2, "fp8": 0}.get(weight, 3)
    assert len(decoding) == (0 if weight == "nf4" and dropout else without)
    assert not any(name.startswith("decode") for name in found.microseconds["backward"])
    assert tuned.fits(found, SMALL_CARD)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("weight", ["int8", "fp8-rows"])
def test_the_truth_is_of_bytes_as_they_are_stored(weight: Any) -> None:
    """For a path that decodes them: dense in 16 bits, as others multiply them, they were rounded."""
    call = replace(CALL, inputs=64, weight=weight)
    drawn, truths = search._prepared(call, device())
    assert drawn.stored is not None
    stored, dense = (drawn.to(torch.float64, unrounded=unrounded) for unrounded in (True, False))
    assert torch.equal(stored.weight, drawn.stored.dense(torch.float64))
    assert torch.equal(dense.weight, drawn.weight.double())
    for unrounded, tensors in ((True, stored), (False, dense)):
        assert torch.equal(truths[unrounded].exact[0], run_eager(tensors)[0])
    # eager's own error is then that of rounding W, too
    assert truths[True].allowed[0] > truths[False].allowed[0]


@pytest.mark.parametrize("weight", [None, "nf4", "int8", "fp8", "fp8-rows"])
@pytest.mark.usefixtures("card")
def test_which_paths_round_the_weight(weight: Any) -> None:
    call = replace(CALL, inputs=64, weight=weight)
    drawn = draw(call, device())
    found = {choice.path for choice in choices("forward", call, device()) if drawn.unrounded_by(choice)}
    assert found == ({"decode"} if weight in ("int8", "fp8-rows") else set())


@pytest.mark.usefixtures("card")
def test_a_weight_beyond_the_workspace_has_paths_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "WORKSPACE_BYTES", CALL.outputs * 64)
    call = replace(CALL, inputs=64, weight="nf4")
    for part in get_args(Pass):
        (first, *others) = choices(part, call, device())
        assert first == Choice("split")
        assert {each.path for each in others} == ({"decode"} if part == "forward" else set())


@pytest.mark.usefixtures("card")
def test_a_quantised_layer_takes_what_was_measured_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    call = replace(CALL, inputs=64, weight="nf4")
    won = Choice("decode", Tile(16, 32, 64, 32, warps=4, stages=4))
    own = replace(record(call), forward=won, weight="nf4")
    dense = replace(own, forward=Choice("single"), weight=None)
    tuned.pin(GPU, [own, dense])

    def taken(**more: Any) -> Choice:
        return kernel_paths.choose("forward", call.shape, torch.float16, device(), dropping=False, **more)

    assert taken(stored="nf4", decodable=True) == won
    assert taken() == Choice("single")
    # blocks that run over the ends of rows: neither that one nor the dense one's
    tuned.pin(GPU, [own, replace(dense, forward=Choice("epilogue"))])
    predicted = taken(stored="other")
    assert taken(stored="nf4") == taken(stored="int8") == predicted != Choice("epilogue")
    # unless a path over dense rows was timed beside it
    timed = {
        "forward": {"decode 16×32×64, 32": 1.0, "split 64×64×32, 16": 3.0, "epilogue": 2.0, "other": 0.5}
    }
    tuned.pin(GPU, [replace(own, microseconds=timed)])
    assert taken(stored="nf4") == Choice("epilogue")
    assert taken(stored="nf4", decodable=True) == won
    tuned.pin(GPU, [own])
    launched: list[Any] = []
    run = decode_triton._four_bits

    def watched(*tensors: Tensor, **settings: Any) -> None:
        launched.append(settings["tile"])
        run(*tensors, **settings)

    monkeypatch.setattr(decode_triton, "_four_bits", watched)
    with fastlora.use_backend("triton"):
        t = draw(call, device())
        assert t.stored is not None
        y = lora_linear(t.x, t.stored, t.bias, t.lora_A, t.lora_B, scaling=1.0)
        expected = lora_linear(t.x, t.weight, t.bias, t.lora_A, t.lora_B, scaling=1.0)
    assert launched == [won.tile]
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("card")
def test_eager_wins_where_it_is_faster() -> None:
    """Both passes, timed later, took longer. The op then runs the eager formula for this call."""
    found, _ = tuned_call(CALL, counting_timer(1, 1, from_host=1))
    for won in (found.in_graph, found.from_host):
        assert won is not None
        assert won.forward == won.backward == Choice(tuned.REFERENCE)
    tuned.pin(GPU, [found])
    assert kernel_paths.prefers_eager(CALL.shape, torch.float16, device(), dropping=False)


@pytest.mark.usefixtures("card")
def test_each_way_to_run_has_a_winner_of_its_own() -> None:
    """The first is the fastest in a CUDA graph, the last where the host launches, and there eager loses."""
    found, _ = tuned_call(CALL, counting_timer(1, 1, from_host=-1))
    first, *_, last = choices("forward", CALL, device())
    assert found.from_host is not None
    assert found.forward == Choice(tuned.REFERENCE)
    assert min(found.microseconds["forward"].values()) == found.microseconds["forward"][name_of(first)]
    assert found.from_host.forward == last


@pytest.mark.usefixtures("card")
def test_calls_take_the_winner_of_the_way_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, dtype = CALL.shape, torch.float16
    tuned.pin(GPU, [record(path="single", from_host="epilogue")])

    def path(**more: Any) -> str:
        return kernel_paths.choose("forward", shape, dtype, device(), dropping=False, **more).path

    t = draw(CALL, device())
    assert (path(), path(in_graph=True)) == ("epilogue", "single")
    # a compiled graph leaves the paths open until its op runs
    assert lora_triton.choice_of("forward", None, shape, t.x, dropping=False).path == "single"
    monkeypatch.setattr(kernel_paths, "_is_capturing", lambda device: True)
    assert path() == "single"
    tuned.pin(GPU, [record(path="single", from_host=tuned.REFERENCE)])
    assert not kernel_paths.prefers_eager(shape, dtype, device(), dropping=False)
    monkeypatch.setattr(kernel_paths, "_is_capturing", lambda device: False)
    assert kernel_paths.prefers_eager(shape, dtype, device(), dropping=False)


def raising(error: Exception) -> Callable[..., Any]:
    def run(*arguments: Any, **more: Any) -> Any:
        raise error

    return run


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("error", "wrong"),
    cases(
        [
            (RuntimeError("Triton Error [CUDA]: invalid argument"), True),
            (OutOfResources(300_000, 232_448, "shared memory"), False),
        ],
        [
            (SyntaxError("at 3:4: " + "source " * 200 + "no such name"), True),
            (torch.OutOfMemoryError("CUDA out of memory"), False),
        ],
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_candidate_that_fails_is_left_out(
    error: Exception, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_triton, "lora_forward_single", raising(error))
    found, left_out = tuned_call(CALL, counting_timer(1, 1))
    assert {each.candidate.split()[1] for each in left_out} == {"single"}
    assert {each.wrong for each in left_out} == {wrong}
    assert all(type(error).__name__ in each.reason and len(each.reason) < 500 for each in left_out)
    assert all(each.reason.endswith(str(error)[-10:]) for each in left_out)
    assert not any(name.startswith("single") for name in found.microseconds["forward"])


@pytest.mark.usefixtures("card")
def test_eager_that_fails_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "run_eager", raising(torch.OutOfMemoryError("CUDA out of memory")))
    found, _ = tuned_call(CALL, counting_timer(1, 1))
    assert list(found.microseconds["step"]) == ["fused"]
    # JSON has no infinity
    json.dumps(asdict(found), allow_nan=False)
    assert _tuned._cells(found, "graph", found.in_graph)[-2:] == ["", ""]


@pytest.mark.usefixtures("card")
def test_a_call_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_triton, "down", raising(torch.OutOfMemoryError("CUDA out of memory")))
    found, (left_out,) = search.tune_call(CALL, device(), counting_timer(1, 1), lambda what: None)
    assert found is None
    assert (left_out.candidate, left_out.wrong) == ("everything", False)


@pytest.mark.usefixtures("card")
def test_a_gpu_that_answers_no_more_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_triton, "lora_forward_single", raising(RuntimeError("an illegal memory access")))
    monkeypatch.setattr(search, "answers", lambda device: False)
    with pytest.raises(
        search.GpuLostError, match=r"after forward single.*illegal memory access.*start again"
    ):
        tuned_call(CALL, counting_timer(1, 1))


class Largest(TorchDispatchMode):
    """Notes how many elements the largest float64 tensor has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor) and each.dtype == torch.float64:
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_truth_of_many_rows_takes_the_memory_of_few(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the eager formula's in float64, and no float64 copy of all rows is made on the way."""
    call = replace(CALL, rows=2000, dropout=dropout, dtype="bfloat16")
    tensors = draw(call, torch.device("cpu"))
    keep = torch.rand(2000, call.inputs) >= dropout if dropout else None
    exact = run_eager(tensors.to(torch.float64), keep=keep)
    monkeypatch.setattr(truth, "_BLOCK_BYTES", 8 * call.outputs * 300)
    with Largest() as largest:
        found = truth.truth_of(tensors, keep)
    assert largest.elements <= 512 * call.outputs
    assert (int(found.rows[0]), int(found.rows[-1]), len(found.rows)) == (0, 1999, 512)
    for index, (got, wanted) in enumerate(zip(found.exact, exact, strict=True)):
        torch.testing.assert_close(got, wanted[found.rows] if index < 2 else wanted)
    # eager itself passes, what is off by a tenth of the largest does not
    eager = run_eager(tensors, keep=keep)
    found.check(eager, first=0)
    for index, value in enumerate(eager):
        with pytest.raises(truth.WrongResult, match="errs by"):
            found.check([value + value.abs().max() / 10], first=index)


def test_a_host_is_timed_on_an_idle_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = [0.0], list[str]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def work() -> None:
        log.append("work")
        # the first calls compile
        clock[0] += 7e-6 if len(log) > 6 else 1.0

    assert timing.host_us(work, torch.device("cuda", 0)) == pytest.approx(7)
    assert log == ["wait", "work"] * (len(log) // 2)


@pytest.mark.usefixtures("card")
def test_a_wrong_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, *rest: Any, **more: Any) -> None:
        lora_forward(x * 1.05, *rest, **more)

    monkeypatch.setattr(lora_triton, "lora_forward", wrong)
    found, left_out = tuned_call(CALL, counting_timer(1000, -1))
    assert left_out != []
    assert all(each.wrong and "WrongResult: errs by" in each.reason for each in left_out)
    assert {each.candidate.split()[1] for each in left_out} == {"split"}
    assert found.forward.path not in ("split", tuned.REFERENCE)


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
    modules = {"lora_forward_single": lora_triton, "lora_add": lora_triton, "forward": lora_torch}
    for name, module in modules.items():
        monkeypatch.setattr(module, name, noting(getattr(module, name), name, ran))
    taken = {"single": "lora_forward_single", "epilogue": "lora_add", "library": "forward"}[path]
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
