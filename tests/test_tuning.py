"""``tune``: every candidate checked and timed, the fastest taken by the op."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastlora
from fastlora.functional import lora_linear
from fastlora.ops import kernel_paths, lora_torch, lora_triton
from fastlora.tuning import search, timing
from fastlora.tuning.candidates import choices, draw, run_forward
from fastlora.tuning.search import name_of
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Choice
from tests.tuning_models import CALL, GPU, device, pretend, record
from tests.tuning_timers import counting_timer, tuned_call

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


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
