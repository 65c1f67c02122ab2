"""What ``python -m fastlora.bench.gpu_check`` compares: right results pass, wrong ones are told."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the check is of the kernels")

from fastlora.bench.gpu_check import exactness, other_ops
from fastlora.bench.gpu_check.comparing import equality, outcome
from fastlora.bench.gpu_check.interpreted_mask import mask_by_interpreter
from fastlora.ops import lora_triton
from fastlora.ops.prepared import Memory
from fastlora.tuning.calls import LayerCall
from fastlora_kernels.lora.forward import lora_forward
from tests.cases import full
from tests.tuning_models import CALL, device, pretend


def test_what_is_allowed() -> None:
    exact = torch.randn(64, 64, dtype=torch.float64)
    eager = exact.bfloat16()
    assert outcome("c", "w", [eager], [eager], [exact], 64)["outcome"]["right"]
    off = (exact * (1 + 3 * torch.finfo(torch.bfloat16).eps)).bfloat16()
    wrong = outcome("c", "w", [eager, off], [eager, eager], [exact, exact], 64)["outcome"]
    assert not wrong["right"]
    assert wrong["error"] > wrong["allowed"] > wrong["eager_error"] > 0
    both = ([eager * float("nan"), eager], [eager, eager], [exact, exact])
    nothing = outcome("c", "w", *both, 64)["outcome"]
    assert not nothing["right"]
    # JSON has no NaN
    assert nothing["error"] is None
    # one rounding of a sum in float32 for each of its terms
    close = exact.float() * (1 + 20 * torch.finfo(torch.float32).eps)
    assert outcome("c", "w", [close], [exact.float()], [exact], 64)["outcome"]["right"]
    assert not outcome("c", "w", [close], [exact.float()], [exact], 8)["outcome"]["right"]
    assert equality("c", "w", eager, off)["outcome"]["right"] is False


@pytest.fixture
def card(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels compute, with the tiles of a small card where that is the interpreter."""
    if kernel_device.type == "cpu":
        pretend(monkeypatch)
    monkeypatch.setattr(exactness, "STRIDED", (33, 32, 48))
    monkeypatch.setattr(exactness, "MANY_ROWS", 40)
    return device()


def outcomes(found: Iterator[Any]) -> list[dict[str, Any]]:
    return [each["outcome"] for each in found]


def assert_right(found: list[dict[str, Any]], least: int) -> None:
    assert [each for each in found if not each["right"]] == []
    assert len(found) >= least


@pytest.mark.parametrize("part", ["forward", full("backward")])
def test_every_path_is_compared(part: Any, card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_right(outcomes(exactness.lora_paths(part, CALL, card)), least=4)

    def wrong(x: Tensor, *rest: Any, **more: Any) -> None:
        lora_forward(x * 1.05, *rest, **more)

    if part == "forward":
        monkeypatch.setattr(lora_triton, "lora_forward", wrong)
        Memory.forget_all()
        found = outcomes(exactness.lora_paths("forward", CALL, card))
        assert {each["what"].split()[0] for each in found if not each["right"]} == {"split"}


@pytest.mark.full
def test_masks_are_those_of_the_interpreter(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = LayerCall(20, 70, 16, 16, 0.5, "float16")
    with monkeypatch.context() as compiling:
        compiling.delenv("TRITON_INTERPRET", raising=False)
        drawn = mask_by_interpreter(call)
    monkeypatch.setattr(exactness, "mask_by_interpreter", lambda call: drawn)
    assert_right(outcomes(exactness.masks(call, card)), least=3)
    monkeypatch.setattr(exactness, "mask_by_interpreter", lambda call: drawn ^ 1)
    assert outcomes(exactness.masks(call, card))[0]["right"] is False


@pytest.mark.full
def test_strides_and_huge_outputs_are_compared(card: torch.device) -> None:
    assert_right(outcomes(exactness.strides(card)), least=12)
    assert_right(outcomes(exactness.huge(CALL, card)), least=2)


def test_replays_are_compared(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no graphs, calling stands for a replay; one that does nothing is told."""
    monkeypatch.setattr(exactness, "captured", lambda work, device: SimpleNamespace(replay=work))
    monkeypatch.setattr(torch, "compile", lambda layer, **options: layer)
    assert_right(outcomes(exactness.replays(0.0, card)), least=3)
    assert_right(outcomes(exactness.replays(0.5, card)), least=1)
    monkeypatch.setattr(exactness, "captured", lambda work, device: SimpleNamespace(replay=lambda: None))
    found = [*outcomes(exactness.replays(0.0, card)), *outcomes(exactness.replays(0.5, card))]
    assert {each["what"] for each in found if not each["right"]} == {"a replay", "another mask"}


def test_dora_and_adapters_are_compared(card: torch.device) -> None:
    sizes: Any = (33, 48, 32, 5, torch.float16, 0.25)
    assert_right(outcomes(other_ops.dora("DoRA", card, *sizes)), least=2)
    for residual in ("input", "tensor", None):
        adapter: Any = (33, 48, 16, torch.float16, 0.25, "gelu", residual)
        assert_right(outcomes(other_ops.adapter("adapter", card, *adapter)), least=1)
