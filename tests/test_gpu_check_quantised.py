"""What ``python -m fastlora.bench.gpu_check`` compares of quantised weights: right passes, wrong is told."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the check is of the kernels")

from fastlora.bench.gpu_check import quantised
from fastlora.bench.gpu_check.items import Item
from fastlora.ops.lora_linear import lora_linear
from fastlora.ops.weights import dense_triton
from fastlora_kernels.choose.paths import choose_path
from fastlora_kernels.quant.kernels import most_rows
from fastlora_kernels.targets import CARDS
from fastlora_kernels.tile import Shape


@pytest.fixture
def items(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Sequence[Item]:
    """All of them, of few numbers."""
    monkeypatch.setattr(quantised, "FOUR_BITS", ((20, 96, 64, True), (35, 33, 32, False)))
    monkeypatch.setattr(quantised, "EIGHT_BITS", ((17, 96, 1, 96), (130, 150, 128, 128)))
    monkeypatch.setattr(quantised, "CALLS", ((17, 48, 64, torch.bfloat16),))
    return quantised.items(kernel_device)


def wrong(items: Sequence[Item]) -> tuple[set[str], int]:
    """Cases with something wrong, and how many outcomes there were."""
    found: list[Any] = [each["outcome"] for item in items for each in item.work()]
    return {each["case"].split(":")[0] for each in found if not each["right"]}, len(found)


def test_what_is_right_passes(items: Sequence[Item]) -> None:
    assert wrong(items) == (set(), 2 * 6 + 2 * 6 + 1)


@pytest.mark.parametrize("card", CARDS)
def test_a_call_in_parts_adds_to_columns_of_y(card: str) -> None:
    """Which no call of a dense weight does."""
    taken = set()
    for m, n, k, dtype in quantised.CALLS:
        part = min(n, most_rows(k, dtype.itemsize))
        if part < n:
            taken.add(choose_path("forward", Shape(m, part, k, 16), dtype, CARDS[card], dropping=True))
    assert "epilogue" in taken


def test_another_table_is_told(items: Sequence[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    fill = dense_triton._dequantise_4bit

    def off(*tensors: Any, **settings: int) -> None:
        *others, table, dense = tensors
        fill(*others, table.roll(1), dense, **settings)

    monkeypatch.setattr(dense_triton, "_dequantise_4bit", off)
    # the call's own definition is made of the same rows
    assert wrong(items)[0] == {"4 bits dense"}


@pytest.mark.full
def test_another_factor_is_told(items: Sequence[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    fill = dense_triton._dequantise_8bit

    def off(codes: Any, scales: Any, *rest: Any, **settings: Any) -> None:
        fill(codes, scales.flip(0).contiguous(), *rest, **settings)

    monkeypatch.setattr(dense_triton, "_dequantise_8bit", off)
    assert wrong(items)[0] == {"8 bits dense"}


@pytest.mark.full
def test_another_scaling_is_told(items: Sequence[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    run = lora_linear
    monkeypatch.setattr(quantised, "lora_linear", lambda *call, scaling: run(*call, scaling=scaling * 1.2))
    assert wrong(items)[0] == {"LoRA over 4 bits"}
