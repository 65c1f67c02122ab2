"""The forward pass that decodes a 4-bit weight in its loop: exact, over the bits of the dense weight."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.quant.forward import lora_forward_4bit
from fastlora_kernels.quant.kernels import LORA_FORWARD_4BIT
from fastlora_kernels.tile import Plan
from tests.kernel_harness import Harness, assert_exact
from tests.stored_weights import FourBits, four_bits, same_bits

SCALE = 1.5


def _plan(harness: Harness, rank: int) -> Plan:
    *_, smallest = plans.tiles(LORA_FORWARD_4BIT, rank, harness.dtype, targets.CARDS["A100"])
    return Plan(smallest)


def _launch(harness: Harness, stored: FourBits, plan: Plan, *layer: Tensor | None) -> tuple[Tensor, Tensor]:
    """S and y of x, bias, A and B."""
    x, bias, a, b = layer
    assert x is not None
    assert b is not None
    m, (n, r) = x.shape[0], b.shape
    s, y = harness.output(m, r), harness.output(m, n)
    given = [None if each is None else harness.input(each.view(1, -1))[0] for each in stored.tensors]
    launch: Any = lora_forward_4bit
    launch(x, *given, bias, a, b, s, y, blocksize=stored.blocksize, scale=SCALE, plan=plan)
    return s, y


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("blocksize", "k"), [(64, 64), (64, 192), (128, 256), (256, 256)])
def test_it_multiplies_by_the_bits_of_the_dense_weight(
    harness: Harness, blocksize: int, k: int, nested: bool
) -> None:
    """Where x is the unit matrix every value is picked once, and nothing is added to it."""
    n = 37
    stored = four_bits(n, k, blocksize, nested=nested)
    a, b = harness.input(torch.zeros(4, k)), harness.input(torch.zeros(n, 4))
    x = harness.input(torch.eye(k).to(harness.dtype), row_stride=k + 7)
    _, y = _launch(harness, stored, _plan(harness, 4), x, None, a, b)
    # a sum that begins with a zero has none with a sign
    assert same_bits(y.cpu() + 0.0, (stored.dense(harness.dtype).t() + 0.0).contiguous())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("card", ["A100", "H100", "MI300X"])
@pytest.mark.parametrize(("m", "n", "k", "r"), [(1, 33, 64, 3), (16, 32, 256, 16), (70, 80, 192, 40)])
def test_as_exact_as_torch(harness: Harness, m: int, n: int, k: int, r: int, card: str, nested: bool) -> None:
    """Every tile; y from S as it is stored, in x's dtype. Only nested factors come with a bias."""
    stored = four_bits(n, k, 64, nested=nested)
    x, offset = harness.random(m, k, padded=True), harness.random(1, n)
    a, b = harness.random(r, k, dtype=torch.float32), harness.random(n, r, dtype=torch.float32)
    dense = stored.dense(harness.dtype).to(x.device)
    for tile in plans.tiles(LORA_FORWARD_4BIT, r, harness.dtype, targets.CARDS[card]):
        s, y = _launch(harness, stored, Plan(tile), x, offset[0] if nested else None, a, b)
        assert_exact(s, lambda x, a: SCALE * (x @ a.t()), x, a.to(x.dtype))
        assert_exact(
            y,
            lambda x, w, s, b, o: x @ w.t() + s @ b.t() + (o if nested else 0),
            *(x, dense, s, b.to(x.dtype), offset),
        )


@pytest.mark.parametrize("rank", [1, 5, 16, 17, 33, 64])
def test_a_tile_holds_the_whole_rank(rank: int) -> None:
    for target in (*targets.TARGETS.values(), targets.DEFAULT):
        for dtype in (torch.bfloat16, torch.float32):
            for aligned in (True, False):
                for tile in plans.tiles(LORA_FORWARD_4BIT, rank, dtype, target, aligned=aligned):
                    assert rank <= tile.rank <= max(32, 2 * rank - 1)
