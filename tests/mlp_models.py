"""What tests of fused MLPs share: steps to compare, calls of the op, what autograd keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.functional import gated_lora_linear
from fastlora.together import compute

WIDTH, INNER, ROWS = 32, 96, (2, 6)


def step(model: Any) -> dict[str, Tensor]:
    """The output, and gradients of x and all parameters."""
    torch.manual_seed(1)
    model.zero_grad()
    x = torch.randn(*ROWS, WIDTH, dtype=next(model.parameters()).dtype, requires_grad=True)
    y = model(x)
    y.backward(torch.randn(y.shape).to(y))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_equal_steps(plain: Any, fused: Any) -> None:
    """One step of each gives the same output, and gradients that are close."""
    expected, got = step(plain), step(fused)
    assert expected.keys() == got.keys()
    assert torch.equal(got["y"], expected["y"])
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=f"{name} is another")


def calls_of_the_op(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Activations with which the op is called from now on."""
    seen: list[str] = []

    def spy(*given: Any, activation: Any, **options: Any) -> Tensor:
        seen.append(activation)
        return gated_lora_linear(*given, activation=activation, **options)

    monkeypatch.setattr(compute, "gated_lora_linear", spy)
    return seen


def kept_of_inner_width(model: Any) -> int:
    """How many tensors of the MLP's inner width a forward pass keeps for backward."""
    places = set[int]()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == (*ROWS, INNER):
            places.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(*ROWS, WIDTH, requires_grad=True))
    del out
    return len(places)


def hook_on(name: str) -> Callable[[Any], None]:
    """Gives a module inside, by its name, twice its input from now on."""

    def change(module: Any) -> None:
        hook = lambda module, inputs: (inputs[0] * 2, *inputs[1:])  # noqa: E731
        module.get_submodule(name).register_forward_pre_hook(hook)

    return change
