"""The chunked loss of language models: the numbers of all logits at once, an eighth of their memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora import reference, use_backend
from fastlora.bench.turns import peak_bytes
from fastlora.functional import chunked_cross_entropy, lora_linear
from tests.cases import cases
from tests.exactness import assert_as_exact
from tests.loss_yardstick import CLASSES, ROWS, capped, eager, labels, linear, numbers, step


def _upcast(rows: Tensor, parameters: list[Tensor]) -> Tensor:
    logits = F.linear(rows, *parameters)
    return logits if logits.dtype == torch.float64 else logits.float()


def _lora(rows: Tensor, parameters: list[Tensor]) -> Tensor:
    weight, bias, lora_A, lora_B = parameters
    return reference.lora_linear(rows, weight, bias, lora_A, lora_B, scaling=0.5)


def _fused_lora(rows: Tensor, parameters: list[Tensor]) -> Tensor:
    return lora_linear(rows, *parameters, scaling=0.5)


HEADS = {
    "frozen": (linear, linear, "linear", 1),
    "trained": (linear, linear, "bias", 0),
    "capped": (capped, capped, "bias", 2),
    "upcast": (_upcast, _upcast, "linear", 0),
    "lora": (_fused_lora, _lora, "lora", 2),
}


@pytest.mark.parametrize("num_items", [None, *cases([40], [torch.tensor(33)])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_it_is_as_exact_as_all_at_once(kind: str, dtype: torch.dtype, num_items: Any) -> None:
    head, plain, shapes, frozen = HEADS[kind]
    operands = numbers(shapes, dtype)
    got = step(chunked_cross_entropy, head, operands, frozen, num_items=num_items)

    def compute(given: list[Tensor]) -> list[Tensor]:
        return step(eager, plain, given, frozen, num_items=num_items)

    if dtype == torch.float64:
        for value, exact in zip(got, compute(operands), strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-14)
    else:
        names = ["loss", "hidden", *(f"parameter {index}" for index in range(len(got) - 2))]
        assert_as_exact(names, got, compute, operands)


def test_the_reference_backend_computes_all_rows_at_once() -> None:
    hidden, weight = numbers("linear", torch.float32)
    seen = list[int]()

    def head(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return F.linear(rows, weight)

    with use_backend("reference"):
        found = chunked_cross_entropy(hidden, labels(), head)
    assert seen == [labels().numel()]
    assert torch.equal(found, eager(hidden, labels(), head))


def test_half_precision_keeps_gradients_of_many_items() -> None:
    """Divided by that many before they are multiplied with the head, they would be nothing in float16."""
    items = 1 << 24
    operands = numbers("linear", torch.float16)
    hidden, weight = (operand.clone().requires_grad_() for operand in operands)
    loss = chunked_cross_entropy(
        hidden, labels(), lambda rows: F.linear(rows, weight), [weight], num_items=items
    )
    (scaled,) = torch.autograd.grad(loss * items, [hidden])
    exact = step(eager, linear, [each.double() for each in operands], num_items=1)
    assert (scaled - 4 * exact[1]).norm() < 2e-3 * (4 * exact[1]).norm()


@pytest.mark.parametrize(("size", "calls"), [(100.0, 16), (10.0, 8)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_does_not_overflow_where_all_at_once_does_not(
    autocast: bool, size: float, calls: int
) -> None:
    """A sum over 8,192 rows is too large for float16, that over a chunk of 100s, too; their mean is not."""
    rows, seen = torch.full((8192, 1), size), []
    wanted = torch.zeros(8192, dtype=torch.int64)
    weight = torch.zeros(16, 1, dtype=torch.float32 if autocast else torch.float16, requires_grad=True)
    hidden = rows.to(weight.dtype).requires_grad_()

    def head(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return F.linear(rows, weight)

    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = chunked_cross_entropy(hidden, wanted, head, [weight])
    found = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    assert len(seen) == calls
    expected = torch.full((16, 1), size / 16)
    expected[0] -= size
    torch.testing.assert_close(found[1].float(), expected, rtol=1e-3, atol=0)
    assert found[1].dtype == weight.dtype
    # as a scaler of gradients does
    (scaled,) = torch.autograd.grad(loss * 2.0**9, [weight])
    torch.testing.assert_close(scaled.float(), expected * 2.0**9, rtol=1e-3, atol=0)


def test_half_precision_keeps_small_probabilities() -> None:
    """Of a class that one row in 100,000 has; divided by the rows, these would be nothing in float16."""
    weight = torch.zeros(100_000, 1, dtype=torch.float16, requires_grad=True)
    hidden, wanted = torch.ones(16, 1, dtype=torch.float16), torch.zeros(16, dtype=torch.int64)
    loss = chunked_cross_entropy(hidden, wanted, lambda rows: F.linear(rows, weight), [weight])
    (found,) = torch.autograd.grad(loss * 1024, [weight])
    torch.testing.assert_close(found[1:].float(), torch.full((99_999, 1), 1024e-5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("num_items", [None, 5])
def test_where_no_label_counts(num_items: int | None) -> None:
    hidden, weight = (operand.requires_grad_() for operand in numbers("linear", torch.float32))
    none = torch.full(ROWS, -100)
    losses = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            loss = chunked_cross_entropy(
                hidden, none, lambda rows: F.linear(rows, weight), [weight], num_items=num_items
            )
        losses.append(loss)
        for gradient in torch.autograd.grad(loss, [hidden, weight]):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    torch.testing.assert_close(*losses, equal_nan=True)


def test_rows_that_do_not_count_are_not_computed() -> None:
    hidden, weight = numbers("linear", torch.float32)
    seen = 0

    def head(rows: Tensor) -> Tensor:
        nonlocal seen
        seen += len(rows)
        return F.linear(rows, weight)

    chunked_cross_entropy(hidden.requires_grad_(), labels(), head)
    assert seen == int((labels() != -100).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_takes_an_eighth_of_the_memory(dtype: torch.dtype) -> None:
    hidden = torch.randn(256, 16, dtype=dtype, requires_grad=True)
    weight, wanted = torch.randn(4096, 16, dtype=dtype), torch.randint(0, 4096, (256,))
    largest = 0

    def head(rows: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(rows))
        return F.linear(rows, weight)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(chunked_cross_entropy(hidden, wanted, head), [hidden])

    train()
    assert largest == 32
    chunked = peak_bytes(train)
    with use_backend("reference"):
        assert chunked <= peak_bytes(train) / 8


def test_bad_input() -> None:
    hidden, weight, bias = numbers("bias", torch.float32)
    bias.requires_grad_()
    hidden.requires_grad_()
    wanted = labels()

    def head(rows: Tensor) -> Tensor:
        return F.linear(rows, weight, bias)

    with pytest.raises(ValueError, match=r"parameters to name every tensor .* one of shape \(50,\)"):
        chunked_cross_entropy(hidden, wanted, head)
    hook = bias.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(ValueError, match=r"without hooks, got one of shape \(50,\)"):
        chunked_cross_entropy(hidden, wanted, head, [bias])
    hook.remove()
    chunked_cross_entropy(hidden, wanted, head, [bias])
    with pytest.raises(ValueError, match="a label for each row"):
        chunked_cross_entropy(hidden, wanted[:, 1:], head)
    with pytest.raises(TypeError, match="int64"):
        chunked_cross_entropy(hidden, wanted.int(), head)
    with pytest.raises(TypeError, match="hidden"):
        chunked_cross_entropy(hidden.long(), wanted, head)
    with pytest.raises(ValueError, match="one device"):
        chunked_cross_entropy(hidden, wanted.to("meta"), head)
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(hidden, wanted.clamp(min=CLASSES), head, [bias])
