"""The tests' own yardstick: it forgives what a CPU's order of sums decides, and no bug."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.exactness import assert_as_exact
from tests.kernel_harness import Harness

M, N, K = 5, 6, 70


def product(operands: list[Tensor]) -> list[Tensor]:
    x, weight = operands
    return [x @ weight.t()]


def backwards(x: Tensor, weight: Tensor) -> Tensor:
    """The product in fp32, one number after the other from the last: another order than any library's."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for k in reversed(range(x.shape[1])):
        total = total + x[:, k, None].float() * weight[:, k].float()
    return total.to(x.dtype)


PLANTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last column left out": lambda x, w: x[:, :-1] @ w[:, :-1].t(),
    "a row written twice": lambda x, w: (x @ w.t())[[0, *range(len(x) - 1)]],
    "a number off by 2 %": lambda x, w: (x @ w.t()) * torch.tensor([1.02] + [1.0] * (len(w) - 1)).to(x),
    "scaled by 1 + 2⁻⁶": lambda x, w: (x @ w.t()) * (1 + 2**-6),
    "a sum in the operands' 16 bits": lambda x, w: sum(
        (x[:, k, None] * w[:, k] for k in range(K)), torch.zeros_like(x[:, :1])
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, M])
def test_another_order_of_sums_passes(rows: int, dtype: torch.dtype) -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        for columns in (1, 3, N):
            x, weight = torch.randn(rows, K).to(dtype), torch.randn(columns, K).to(dtype)
            assert_as_exact(["y"], [backwards(x, weight)], product, [x, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug: str, dtype: torch.dtype) -> None:
    if "16 bits" in bug and dtype == torch.float32:
        # there it is no bug
        return
    x, weight = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    with pytest.raises(AssertionError, match=r"y: error .* eager's"):
        assert_as_exact(["y"], [PLANTED[bug](x, weight)], product, [x, weight])


def test_an_fp32_sum_of_16_bit_numbers_is_held_to_fp32() -> None:
    """Of partial results: one that was rounded to 16 bits between is a bug."""
    x, weight = (torch.randn(rows, K).bfloat16() for rows in (M, N))
    rounded = (x.float() @ weight.float().t()).bfloat16().float()
    with pytest.raises(AssertionError, match="y: error"):
        assert_as_exact(["y"], [rounded], product, [x, weight], dtype=torch.float32)


def test_margins_never_reach_the_yardstick() -> None:
    """Torch's own products may read them; the eager formula gets operands without any."""
    harness, seen = Harness(torch.bfloat16, torch.device("cpu")), list[bool]()
    operands = [harness.random(rows, 69, padded=True) for rows in (37, 30)]

    def compute(tensors: list[Tensor]) -> list[Tensor]:
        seen.extend(tensor.stride() == (69, 1) for tensor in tensors)
        return product(tensors)

    assert_as_exact(["y"], product([tensor.clone() for tensor in operands]), compute, operands)
    assert seen == [True] * 4


def test_no_test_has_a_time_limit() -> None:
    """A loaded machine is no fault of the code: a hang is for the run's own limit to end."""
    limits = re.compile(r"\btimeout\s*=\s*[\d.]+")
    files = [
        path for path in Path(__file__).parents[1].rglob("*.py") if limits.search(path.read_text("utf-8"))
    ]
    assert files == []
