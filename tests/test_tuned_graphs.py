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
from fastlora.tuning.candidates import draw
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.lora.single import lora_forward_single
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
        assert launched == ["single"]
        # with dX and without it
        assert loaded == ["forward single", "backward split", "backward split"]
        with torch.no_grad():
            lora_linear(*layer, scaling=1.0)
        assert loaded[3:] == ["forward single"]
        assert torch.equal(torch.get_rng_state(), state)
        monkeypatch.setattr(kernel_paths, "_is_capturing", lambda device: True)
        Memory.forget_all()
        lora_linear(*layer, scaling=1.0)
    assert len(loaded) == 4
    assert len(launched) == 3


def test_what_a_graph_of_dora_will_launch_is_loaded_before(loaded: list[str]) -> None:
    """Measured is its backward pass."""
    apart = record(path="split", from_host="split")
    tuned.pin(GPU, [replace(apart, backward=Choice("epilogue"))])
    t = draw(CALL, device())
    magnitude = torch.ones(CALL.outputs, device=device())
    with fastlora.use_backend("triton"):
        for _ in range(2):
            dora_linear(t.x, t.weight, t.bias, t.lora_A, t.lora_B, magnitude, scaling=1.0)
    assert loaded[1:] == ["backward epilogue", "backward epilogue"]


def test_nothing_more_is_loaded_where_the_same_won(loaded: list[str]) -> None:
    tuned.pin(GPU, [record(path="single", from_host="single")])
    t = draw(CALL, device())
    with fastlora.use_backend("triton"):
        lora_linear(t.x, t.weight, t.bias, t.lora_A, t.lora_B, scaling=1.0)
    assert loaded == []
