"""What ``python -m fastlora.bench.gpu_check`` compares of layers on one x: right passes, wrong is told."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the check is of the kernels")

from fastlora.bench.gpu_check import shared
from fastlora.bench.gpu_check.items import Item
from fastlora.ops import shared_triton, shared_triton_forward
from fastlora_kernels.choose.shared import SHARED_PATHS
from fastlora_kernels.shared.down import shared_down
from fastlora_kernels.shared.grad_x import shared_grad_x


@pytest.fixture
def items(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Sequence[Item]:
    """All of them, of few numbers."""
    sizes = ((48, 16), (32, 8), (16, 8))
    groups = ((17, 64, sizes, "bfloat16", 0.0), (17, 64, sizes[:2], "float32", 0.3))
    monkeypatch.setattr(shared, "GROUPS", groups)
    return shared.items(kernel_device)


def outcomes(items: Sequence[Item]) -> list[Any]:
    return [each["outcome"] for item in items for each in item.work()]


def test_what_is_right_passes(items: Sequence[Item]) -> None:
    found = outcomes(items)
    # a path, or one and a tile, after the forward pass and the second group's masks
    expected = [*("one", *SHARED_PATHS), *("one", "one", "one", *SHARED_PATHS)]
    assert [each["what"].split()[0] for each in found] == expected
    assert all(each["right"] for each in found)


def test_another_mask_is_told(items: Sequence[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the first layer for the second one."""

    def off(dx: Tensor, *tensors: Tensor | None, **settings: Any) -> Any:
        changed = [*tensors]
        changed[9] = changed[4]
        return shared_grad_x(dx, *changed, **settings)

    monkeypatch.setattr(shared_triton, "shared_grad_x", off)
    wrong = [each for each in outcomes(items) if not each["right"]]
    assert [(each["case"], each["what"].split()[0]) for each in wrong] == [(items[1].name, "shared")]


@pytest.mark.full
def test_another_seed_is_told(items: Sequence[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the first layer for the second one."""

    def off(x: Tensor, s: Tensor, *tensors: Tensor | None, **settings: Any) -> Any:
        changed = [*tensors]
        changed[4] = changed[1]
        return shared_down(x, s, *changed, **settings)

    monkeypatch.setattr(shared_triton_forward, "shared_down", off)
    wrong = [each for each in outcomes(items) if not each["right"]]
    assert [(each["case"], each["what"].partition(":")[0]) for each in wrong] == [
        (items[1].name, "one read of x")
    ] * 2
    assert wrong[1]["what"].startswith("one read of x: mask 2: ")


@pytest.mark.full
@pytest.mark.parametrize("number", [1, 2], ids=["S", "mask"])
def test_what_is_wrong_beside_y_is_told(
    items: Sequence[Item], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y is filled before: what is kept for the backward pass is another."""
    forward = shared_triton_forward.forward

    def off(*call: Any, **settings: Any) -> Any:
        made: Any = forward(*call, **settings)
        if made[1][number] is not None:
            made[1][number].add_(1)
        return made

    monkeypatch.setattr(shared_triton_forward, "forward", off)
    wrong = {each["what"].rpartition(":")[0] or each["what"] for each in outcomes(items) if not each["right"]}
    assert wrong == {"one read of x" + ": mask 2" * (number == 2)}
