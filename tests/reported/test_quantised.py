"""Complaints about 4-bit bases: what merging costs, and what is left of it when it is undone."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

import fastlora
from tests.quantised import four_bit

SIZE = 128


def adapted(storage: torch.dtype = torch.uint8) -> Any:
    """Two 4-bit layers whose update is small beside their weights, as training leaves it."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"compute_dtype": torch.float32, "quant_storage": storage}
    net = nn.Sequential(four_bit(SIZE, SIZE, **settings), nn.Tanh(), four_bit(SIZE, SIZE, **settings))
    model: Any = fastlora.apply_lora(net, rank=4)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B, std=1e-3)
    return model


def inputs() -> Tensor:
    return torch.randn(16, SIZE, generator=torch.Generator().manual_seed(1))


def values(layer: Any) -> Tensor:
    """The frozen weight as bitsandbytes makes it dense."""
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def lost(layer: Any, merged: Tensor, frozen: Tensor) -> float:
    """The share of a layer's update that its merged weight has not."""
    update = layer.scaling * layer.lora_B @ layer.lora_A
    return float((merged.float() - frozen - update).norm() / update.norm())


def test_a_merge_does_not_quantise_the_update_away(caplog: pytest.LogCaptureFixture) -> None:
    """peft#2321, #2105: four bits hold next to nothing of it, and the accuracy is gone."""
    model = adapted()
    layer = model[0]
    frozen, before = values(layer), model(inputs())
    fastlora.merge_adapters(model)
    assert lost(layer, layer.weight, frozen) < 0.15
    exact = (model(inputs()) - before).norm()
    fastlora.unmerge_adapters(model)
    fastlora.merge_adapters(model, requantise=True)
    assert lost(layer, values(layer), frozen) > 0.5
    assert (model(inputs()) - before).norm() > 3 * exact
    assert "relative error" in caplog.messages[-1]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_merging_again_and_again_does_not_drift(storage: torch.dtype) -> None:
    """peft#2502; bytes stored as floats, too (peft#2501: merging them fails)."""
    model, x = adapted(storage), inputs()
    before, stored = model(x), [layer.weight.data.view(torch.uint8).clone() for layer in (model[0], model[2])]
    for requantise in (False, True, False):
        fastlora.merge_adapters(model, requantise=requantise)
        assert torch.isfinite(model(x)).all()
        fastlora.unmerge_adapters(model)
        assert torch.equal(model(x), before)
    for layer, bits in zip((model[0], model[2]), stored, strict=True):
        assert torch.equal(layer.weight.data.view(torch.uint8), bits)
