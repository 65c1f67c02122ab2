"""What ``tune`` found for CUDA graphs is loaded before one is made."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastlora
from fastlora.functional import dora_linear, lora_linear
from fastlora.ops import before_graphs, kernel_paths, lora_passes, lora_triton
from fastlora.ops.prepared import Memory
from fastlora.ops.weights.scaled import ScaledWeight
from fastlora.tuning.candidates import draw
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.lora.single import lora_forward_single
from fastlora_kernels.quant import kernels as quantised
from tests.tuning_models import CALL, GPU, device, pretend, record

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Passes and paths that run for the sake of a CUDA graph alone."""
    found: list[str] = []
    pretend(monkeypatch)

    def noting(part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            found.append(f"{part} {getattr(arguments[-1].paths, part).path}")
            return run(*arguments)

        return noted

    for part in ("forward", "backward"):
        name = f"lora_linear_{part}"
        monkeypatch.setattr(before_graphs, name, noting(part, getattr(lora_passes, name)))
    Memory.forget_all()
    return found


def test_what_a_graph_will_launch_is_loaded_before(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be loaded while it is made. The call itself takes what won where Python launches."""
    launched: list[str] = []

    def noted(*arguments: Any, **more: Any) -> None:
        launched.append("single")
        lora_forward_single(*arguments, **more)

    monkeypatch.setattr(lora_triton, "lora_forward_single", noted)
    tuned.pin(GPU, [record(path="single", from_host="epilogue")])
    t = draw(CALL, device())
    layer, state = (t.x, t.weight, t.bias, t.lora_A, t.lora_B), torch.get_rng_state()
    with fastlora.use_backend("triton"):
        for _ in range(2):
            lora_linear(*layer, scaling=1.0)
        # backward the same won
        assert loaded == ["forward single"]
        assert launched == ["single"]
        with torch.no_grad():
            lora_linear(*layer, scaling=1.0)
        assert torch.equal(torch.get_rng_state(), state)
        monkeypatch.setattr(kernel_paths, "_is_capturing", lambda device: True)
        Memory.forget_all()
        lora_linear(*layer, scaling=1.0)
    assert len(loaded) == 1
    assert len(launched) == 2


def test_it_is_loaded_once_for_any_number_of_rows(loaded: list[str]) -> None:
    """Batches have many lengths. Rows whose kernels are compiled apart are loaded, too."""
    tuned.pin(GPU, [record(path="single", from_host="epilogue")])
    t = draw(CALL, device())
    with fastlora.use_backend("triton"):
        for rows in (33, 35, 37, 39):
            lora_linear(t.x[:rows], t.weight, t.bias, t.lora_A, t.lora_B, scaling=1.0)
        assert loaded == ["forward single"]
        lora_linear(t.x[:32], t.weight, t.bias, t.lora_A, t.lora_B, scaling=1.0)
        assert loaded == ["forward single"] * 2
        lora_linear(t.x[:32], t.weight, None, t.lora_A, t.lora_B, scaling=1.0)
    assert loaded == ["forward single"] * 3


@pytest.mark.parametrize(("op", "dropout"), [("lora", 0.0), ("lora", 0.1), ("dora", 0.0)])
def test_backward_is_loaded_alone_for_the_gradients_that_are_wanted(
    op: str, dropout: float, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a frozen A, or without dX, a graph launches other kernels."""
    asked: list[tuple[bool, ...]] = []
    run: Any = vars(before_graphs)["lora_linear_backward"]

    def noted(*arguments: Any) -> Any:
        asked.append(arguments[-4:-1])
        return run(*arguments)

    monkeypatch.setattr(before_graphs, "lora_linear_backward", noted)
    apart = record(replace(CALL, dropout=dropout), "split", from_host="split")
    tuned.pin(GPU, [replace(apart, backward=Choice("epilogue"))])
    t = draw(CALL, device())

    def call(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if op == "lora":
            return lora_linear(x, t.weight, t.bias, a, b, scaling=1.0, dropout=dropout)
        magnitude = torch.ones(CALL.outputs, device=device())
        return dora_linear(x, t.weight, t.bias, a, b, magnitude, scaling=1.0)

    x, a, b = (each.detach() for each in (t.x, t.lora_A, t.lora_B))
    with fastlora.use_backend("triton"):
        call(x, a, b)
        assert loaded == []
        for wanted in ((True, False, True), (False, True, True), (True, False, True)):
            call(*(each.detach().requires_grad_(need) for each, need in zip((x, a, b), wanted, strict=True)))
    assert asked == [(True, False, True), (False, True, True)]
    assert loaded == ["backward epilogue"] * 2


def test_with_too_little_memory_the_call_goes_on(loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.pin(GPU, [record(path="single", from_host="epilogue")])
    t = draw(CALL, device())
    tried: list[int] = []

    def too_large(x: torch.Tensor, *more: Any) -> None:
        tried.append(len(x))
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")

    monkeypatch.setattr(before_graphs, "lora_linear_forward", too_large)
    with fastlora.use_backend("triton"):
        for rows in (39, 39, 37):
            y = lora_linear(t.x[:rows], t.weight, t.bias, t.lora_A, t.lora_B, scaling=1.0)
            assert y.shape == (rows, CALL.outputs)
    assert tried == [39, 37]


def test_a_part_of_a_quantised_weight_is_chosen_for_whoever_launches_it(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph's paths while they are loaded, and Python's where the call itself runs."""
    half = CALL.outputs // 2
    monkeypatch.setattr(quantised, "WORKSPACE_BYTES", half * CALL.inputs * 2)
    chosen: list[tuple[str, bool]] = []
    choose = kernel_paths.choose

    def noted(part: Any, shape: Any, *rest: Any, in_graph: bool = False, **more: Any) -> Any:
        if shape.n == half:
            chosen.append((part, in_graph))
        return choose(part, shape, *rest, in_graph=in_graph, **more)

    monkeypatch.setattr(kernel_paths, "choose", noted)
    apart = record(path="single", from_host="split")
    tuned.pin(GPU, [replace(apart, backward=Choice("epilogue"), weight="int8")])
    t = draw(CALL, device())
    codes = torch.ones(CALL.outputs, CALL.inputs, dtype=torch.int8, device=device())
    weight = ScaledWeight(codes, torch.ones(1, 1, device=device()), (CALL.outputs, CALL.inputs))
    x = t.x.detach().requires_grad_()
    with fastlora.use_backend("triton"):
        y = lora_linear(x, weight, t.bias, t.lora_A, t.lora_B, scaling=1.0)
        # both halves are alike; those of the call itself come last
        assert list(dict.fromkeys(chosen)) == [("forward", True), ("backward", True), ("forward", False)]
        y.sum().backward()
    assert chosen[-1] == ("backward", False)


def test_nothing_more_is_loaded_where_the_same_won(loaded: list[str]) -> None:
    tuned.pin(GPU, [record(path="single", from_host="single")])
    t = draw(CALL, device())
    with fastlora.use_backend("triton"):
        lora_linear(t.x, t.weight, t.bias, t.lora_A, t.lora_B, scaling=1.0)
    assert loaded == []
