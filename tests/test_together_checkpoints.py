"""Checkpoints of layers that are computed together: they repeat what was computed and drawn."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from tests import sibling_models
from tests.sibling_models import (
    Attention,
    an_input,
    apart,
    assert_as_apart,
    attention,
    family,
    groups,
    run,
    step,
)

pytestmark = pytest.mark.usefixtures("way")


class Checkpointed(nn.Module):
    """Calls a module under a checkpoint."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x: Tensor) -> Any:
        """As the module."""
        return checkpoint(self.module, x, **self.options)


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "early_stop": False}],
)
def test_checkpoints_repeat_what_was_computed(options: dict[str, Any]) -> None:
    module = attention(dropout=0.2)
    with apart():
        expected = run(module)
    with groups() as seen:
        found = run(Checkpointed(module, **options))
    assert_as_apart({name.removeprefix("module."): each for name, each in found.items()}, expected)
    assert set(seen) == {3}


@pytest.mark.parametrize("trains", [True, False])
def test_kernels_compute_alike_what_a_checkpoint_repeats(trains: bool, kernel_device: torch.device) -> None:
    """The first pass has no gradients, and no x that says whether one will be wanted."""
    pytest.importorskip("triton", reason="kernels need Triton")
    module = attention().to(kernel_device).train(trains)
    x = an_input().detach().to(kernel_device).requires_grad_()
    with fastlora.use_backend("triton"), groups() as seen:
        expected = module(x * 1)
        y = checkpoint(lambda x: module(x * 1), x, use_reentrant=True)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert seen == ([3, 3, 3] if trains else [])


class WithDropoutBetween(Attention):
    """Draws random numbers between the calls."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        q = nn.functional.dropout(self.q(x), 0.5)
        mixed: Tensor = self.o(q * self.k(x) + self.v(x))
        return mixed


@pytest.mark.parametrize("first", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_repeat_what_is_drawn_between_calls(reentrant: bool, first: float) -> None:
    module = attention(WithDropoutBetween(), dropout=0.2)
    sibling_models.way.set_dropout(module.q, first)
    expected = run(module)
    found = run(Checkpointed(module, use_reentrant=reentrant))
    assert_as_apart({name.removeprefix("module."): each for name, each in found.items()}, expected)


def test_masks_are_drawn_at_once_whatever_wants_a_gradient() -> None:
    module, x, found = attention(WithDropoutBetween(), dropout=0.2), an_input(), list[Tensor]()
    for enabled, given in ((True, x), (True, x.detach()), (False, x)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(enabled):
            found.append(module(given * 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_checkpoint_of_every_layer_repeats_what_was_computed() -> None:
    module = attention(dropout=0.2)
    with apart():
        expected = run(module)
    for layer in (module.q, module.k, module.v):
        layer.forward = checkpointed(layer)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert not seen


def checkpointed(layer: Any) -> Any:
    """The layer's forward under a checkpoint."""
    return lambda x: checkpoint(type(layer).forward, layer, x, use_reentrant=False)


def test_a_checkpoint_of_a_call_between_the_others_repeats_what_was_computed() -> None:
    module = attention()

    def forward(x: Tensor) -> Tensor:
        query: Tensor = module.q(x)
        key: Tensor = checkpoint(lambda x: module.k(x), x, use_reentrant=False)
        mixed: Tensor = module.o(query * key + module.v(x))
        return mixed

    module.forward = forward
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == [3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_takes_the_steps_of_one_apart(reentrant: bool) -> None:
    model, batch = family("Qwen2", dropout=0.1)
    model.enable_input_require_grads()
    with apart():
        expected = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with groups() as seen:
        assert_as_apart(step(model, batch), expected)
    assert seen.count(3) == 4
