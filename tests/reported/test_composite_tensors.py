"""Nested tensors in our own layers, which run the eager formula for them, and weights quantised later."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fastlora

SIZE = 8

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: fastlora.LoRALinear(SIZE, SIZE, rank=2),
    "linear with dora": lambda: fastlora.LoRALinear(SIZE, SIZE, rank=2, dora=True),
    "wrapped": lambda: fastlora.LoRALayer(nn.Linear(SIZE, SIZE), rank=2),
    "adapter": lambda: fastlora.AdapterLayer(SIZE, 4),
    "adapter with a norm before": lambda: fastlora.AdapterLayer(SIZE, 4, layer_norm="pre"),
    "adapter with a norm after": lambda: fastlora.AdapterLayer(SIZE, 4, layer_norm="post", scale="learned"),
}


def awake(layer: nn.Module) -> nn.Module:
    for name, parameter in layer.named_parameters():
        if name.endswith(("lora_A", "lora_B", "proj.weight")):
            nn.init.normal_(parameter)
    return layer


def parts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, SIZE, generator=generator) for count in (3, 5)]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_jagged_tensor_is_computed_part_by_part(kind: str) -> None:
    """Without padding, as ``nn.Linear`` takes it; the gradients too."""
    layer = awake(LAYERS[kind]())
    expected = layer(torch.cat(parts()))
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    x = torch.nested.nested_tensor(parts(), layout=torch.jagged, requires_grad=True)
    y = layer(x)
    assert y.is_nested
    torch.testing.assert_close(y.values(), expected)
    y.values().square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_nested_tensors_under_autocast_and_dropout() -> None:
    layer = fastlora.LoRALinear(SIZE, SIZE, rank=2, dropout=0.5)
    x = torch.nested.nested_tensor(parts(), layout=torch.jagged)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = awake(layer)(x)
    assert y.dtype == torch.bfloat16
    assert not torch.equal(layer(x).values(), layer(x).values())


def test_strided_nested_tensors_are_taken() -> None:
    layer = awake(LAYERS["linear"]())
    y = layer(torch.nested.nested_tensor(parts()))
    for found, part in zip(y.unbind(), parts(), strict=True):
        torch.testing.assert_close(found, layer(part))


def test_indices_may_be_nested() -> None:
    layer = fastlora.LoRAEmbedding(10, SIZE, rank=2)
    nn.init.normal_(layer.lora_embedding_A)
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    found = layer(torch.nested.nested_tensor(rows, layout=torch.jagged))
    torch.testing.assert_close(found.values(), layer(torch.cat(rows)))


@pytest.mark.parametrize("layer", [LAYERS["linear"](), LAYERS["adapter"]()], ids=["linear", "adapter"])
def test_a_backend_asked_for_by_name_does_not_fall_back(layer: nn.Module) -> None:
    x = torch.nested.nested_tensor(parts(), layout=torch.jagged)
    with fastlora.use_backend("torch"), pytest.raises(ValueError, match=r"plain tensors, got a NestedTensor"):
        layer(x)


def test_dora_beside_weights_that_are_quantised_later_is_refused() -> None:
    layer = fastlora.LoRALinear(64, 64, rank=2, dora=True)
    quantize_(layer, Int8WeightOnlyConfig(version=2))
    with pytest.raises(TypeError, match="a dense weight for DoRA"):
        layer(torch.randn(4, 64))


def test_weights_that_are_quantised_later_are_used() -> None:
    """torchao puts tensors of its own in the place of our frozen weights."""
    model = fastlora.apply_lora(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), rank=2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.01)
    x = torch.randn(4, 64)
    exact = model(x)
    quantize_(
        model, Int8WeightOnlyConfig(version=2), filter_fn=lambda module, name: isinstance(module, nn.Linear)
    )
    # a backend asked for by name does not fall back
    with fastlora.use_backend("torch"):
        found = model(x)
    assert type(model[0].weight) is not nn.Parameter
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0.0)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
