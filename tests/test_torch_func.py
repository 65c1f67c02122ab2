"""torch.func over our layers: functional calls, per-example gradients, vmap."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastlora

LAYERS: dict[str, Any] = {
    "lora": lambda: fastlora.LoRALinear(6, 6, rank=2),
    "dora": lambda: fastlora.LoRALinear(6, 6, rank=2, dora=True),
    "adapter": lambda: fastlora.AdapterLayer(6, adapter_size=3),
}


def make(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    layer: nn.Module = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer, {key: p.detach() for key, p in layer.named_parameters()}, torch.randn(5, 6)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_functional_call(name: str) -> None:
    layer, values, x = make(name)
    found = grad(lambda given: functional_call(layer, given, (x,)).square().sum())(values)
    layer.requires_grad_(True)
    with fastlora.use_backend("reference"):
        layer(x).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[key], parameter.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_every_example(name: str) -> None:
    layer, values, x = make(name)

    def loss(given: dict[str, Tensor], row: Tensor) -> Tensor:
        out: Tensor = functional_call(layer, given, (row[None],)).square().sum()
        return out

    each = vmap(grad(loss), in_dims=(None, 0))(values, x)
    alone = [grad(loss)(values, row) for row in x]
    for key, gradients in each.items():
        torch.testing.assert_close(gradients, torch.stack([one[key] for one in alone]))
