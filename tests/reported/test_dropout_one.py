"""A dropout of 1, as an ablation has it: ``nn.Dropout`` keeps nothing then, and so do all our layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora import functional, reference

ROWS, SIZE = 3, 8
BACKENDS = ("auto", "triton", "torch", "reference")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: fastlora.LoRALinear(SIZE, SIZE, rank=2, dropout=1.0),
    "conv": lambda: fastlora.LoRAConv2d(SIZE, SIZE, 1, rank=2, dropout=1.0),
    "wrapped": lambda: fastlora.LoRALayer(nn.Linear(SIZE, SIZE), rank=2, dropout=1.0),
    "adapter": lambda: fastlora.AdapterLayer(SIZE, 4, dropout=1.0),
}


def awake(layer: nn.Module) -> nn.Module:
    for name, parameter in layer.named_parameters():
        if name.endswith(("lora_A", "lora_B", "proj.weight", "up_proj.bias")):
            nn.init.normal_(parameter)
    return layer


def switched_off(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer with an update of zeros."""
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith(("lora_B", "up_proj.weight")):
            tensor.zero_()
    out: Tensor = torch.func.functional_call(layer.eval(), state, (x,))
    layer.train()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_of_an_update_is_kept(kind: str, backend: str, kernel_device: torch.device) -> None:
    layer = awake(LAYERS[kind]())
    if backend == "triton":
        layer.to(kernel_device)
    shape = (ROWS, SIZE, 2, 2) if kind == "conv" else (ROWS, SIZE)
    x = torch.randn(shape, device=next(layer.parameters()).device, requires_grad=True)
    with fastlora.use_backend(backend):
        y = layer(x)
        torch.testing.assert_close(y, switched_off(layer, x))
        y.sum().backward()
        assert not torch.equal(layer.eval()(x), y)
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    matrices = [t for name, t in gradients.items() if name.endswith(("lora_A", "lora_B", "proj.weight"))]
    assert len(matrices) == 2
    assert not any(gradient.any() for gradient in matrices)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_ops_are_those_of_an_empty_mask(dora: bool, backend: str) -> None:
    """A generator is not touched, and DoRA's norm stays that of the whole weight."""
    shapes = ((2, 3), (4, 3), (4,), (2, 3), (4, 2)) + ((4,),) * dora
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    x = tensors[0]
    op: Any = functional.lora_linear
    by_mask: Any = reference.lora_linear_with_mask
    if dora:
        op, by_mask = functional.dora_linear, reference.dora_linear_with_mask
    expected = by_mask(*tensors, torch.zeros_like(x), scaling=2.0, keep_probability=1.0)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    with fastlora.use_backend(backend):
        y = op(*tensors, scaling=2.0, dropout=1.0, generator=generator)
        gradients = torch.autograd.grad(y.square().sum(), tensors)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), tensors))
    assert torch.equal(generator.get_state(), state)


def test_a_compiled_layer_follows_when_it_changes() -> None:
    layer = awake(LAYERS["linear"]())
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(ROWS, SIZE)
    frozen = F.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    for dropout, nothing_left in ((1.0, True), (0.5, False)):
        layer.lora_dropout = dropout  # type: ignore[assignment]
        assert torch.equal(compiled(x), frozen) == nothing_left


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout in \[0, 1\]"):
        fastlora.LoRALinear(4, 4, dropout=dropout)
    with pytest.raises(ValueError, match=r"dropout probability in \[0, 1\]"):
        functional.lora_linear(
            torch.ones(1, 2),
            torch.eye(2),
            None,
            torch.ones(1, 2),
            torch.ones(2, 1),
            scaling=1.0,
            dropout=dropout,
        )
