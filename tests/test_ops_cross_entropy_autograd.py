"""Autograd of the chunked loss: what it keeps, whose gradients it gives, in any order and number."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from fastlora.functional import chunked_cross_entropy
from tests.loss_yardstick import CLASSES, HIDDEN, capped, eager, labels, linear, numbers, step


def test_hooks_of_the_caller_on_saved_tensors_see_what_is_kept_alone() -> None:
    """A checkpoint counts what it sees."""
    hidden, weight = (operand.requires_grad_() for operand in numbers("linear", torch.float32))
    seen = list[tuple[int, ...]]()

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_cross_entropy(hidden, labels(), lambda rows: F.linear(rows, weight), [weight])
    rows = (labels().numel(), HIDDEN)
    # the head's weight and its gradient, that of hidden, and two that are nearly nothing
    assert sorted(seen) == sorted([(0, HIDDEN), (), (CLASSES, HIDDEN), (CLASSES, HIDDEN), rows])


def test_gradients_by_finite_differences() -> None:
    operands = [operand.requires_grad_() for operand in numbers("bias", torch.float64)]

    def loss(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, labels(), lambda rows: capped(rows, [*parameters]), parameters)

    assert torch.autograd.gradcheck(loss, operands, fast_mode=True)


def test_backward_twice_and_none_at_all() -> None:
    hidden, weight = (operand.requires_grad_() for operand in numbers("linear", torch.float32))
    loss = chunked_cross_entropy(hidden, labels(), lambda rows: F.linear(rows, weight), [weight])
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(loss, [hidden, weight]), strict=True):
        assert torch.equal(once, again)
    with torch.no_grad():
        alone = chunked_cross_entropy(hidden, labels(), lambda rows: F.linear(rows, weight), [weight])
    assert not alone.requires_grad
    assert torch.equal(alone, loss)


def test_a_tensor_used_twice_or_not_at_all() -> None:
    hidden, weight = (operand.requires_grad_() for operand in numbers("linear", torch.float64))
    unused = torch.ones(3, requires_grad=True)

    def head(rows: Tensor) -> Tensor:
        return F.linear(rows, weight) + F.linear(rows.tanh(), weight)

    found = chunked_cross_entropy(hidden, labels(), head, [unused, weight])
    expected = eager(hidden, labels(), head)
    gradients = [torch.autograd.grad(loss, [weight], retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    # an optimiser leaves it alone, as it does without a gradient
    assert torch.autograd.grad(found, [unused], allow_unused=True)[0] is None


def test_hidden_states_that_want_no_gradient() -> None:
    hidden, weight = numbers("linear", torch.float64)
    weight.requires_grad_()

    def head(rows: Tensor) -> Tensor:
        return F.linear(rows, weight)

    found = chunked_cross_entropy(hidden, labels(), head, [weight])
    expected = eager(hidden, labels(), head)
    gradients = [torch.autograd.grad(loss, [weight])[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_parameters_whose_gradients_are_one_tensor() -> None:
    hidden, weight = numbers("linear", torch.float64)
    ones = [torch.ones(CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def head(rows: Tensor) -> Tensor:
        return F.linear(rows, weight) + (ones[0] + ones[1])

    found = chunked_cross_entropy(hidden, labels(), head, ones)
    expected = eager(hidden, labels(), head)
    gradients = [torch.autograd.grad(loss, ones) for loss in (found, expected)]
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-14)


def test_no_second_derivative() -> None:
    hidden, weight = (operand.requires_grad_() for operand in numbers("linear", torch.float32))
    loss = chunked_cross_entropy(hidden, labels(), lambda rows: F.linear(rows, weight), [weight])
    (gradient,) = torch.autograd.grad(loss, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), [hidden])


def test_in_a_compiled_graph() -> None:
    hidden, weight = (operand.requires_grad_() for operand in numbers("linear", torch.float32))

    wanted = labels()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden: Tensor, weight: Tensor) -> Any:
        return chunked_cross_entropy(hidden, wanted, lambda rows: F.linear(rows, weight), [weight])

    found = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    expected = step(eager, linear, [hidden, weight])
    for value, quarter in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(value, 4 * quarter)
