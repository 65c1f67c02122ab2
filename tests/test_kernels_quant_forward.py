"""The forward passes that decode a weight in their loop: exact, from 8 bits without rounding W at all."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.quant.forward import lora_forward_4bit, lora_forward_8bit
from fastlora_kernels.quant.kernels import LORA_FORWARD_4BIT, LORA_FORWARD_8BIT
from fastlora_kernels.tile import Plan
from tests.cases import cases
from tests.exactness import assert_as_exact
from tests.kernel_harness import Harness, assert_exact
from tests.stored_weights import FLOAT8_VALUES, FourBits, eight_bits, four_bits, same_bits

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
@pytest.mark.parametrize(("blocksize", "k"), cases([(64, 64), (64, 192)], [(128, 256), (256, 256)]))
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
@pytest.mark.parametrize("card", cases(["H100"], ["A100", "MI300X"]))
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


def _fill_y(
    harness: Harness, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, s: Tensor, b: Tensor,
    plan: Plan, *, is_float: bool,
) -> Tensor:  # fmt: skip
    y = harness.output(x.shape[0], codes.shape[0])
    codes, scales = harness.input(codes), harness.input(scales[None])[0]
    lora_forward_8bit(x, codes, scales, bias, s, b, y, is_float=is_float, plan=plan)
    return y


@pytest.mark.parametrize("of_rows", [True, False], ids=["a scale a row", "one scale"])
@pytest.mark.parametrize("is_float", [True, False], ids=["float8", "int8"])
@pytest.mark.parametrize("card", cases(["H100"], ["A100", "unknown"]))
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    cases([(1, 33, 67, 3), (70, 80, 192, 40)], [(16, 31, 129, 16), (65, 130, 64, 64), (17, 1, 1, 1)]),
)
def test_eight_bits_are_as_exact_as_torch(
    harness: Harness, m: int, n: int, k: int, r: int, card: str, is_float: bool, of_rows: bool
) -> None:
    """Every tile, aligned or not; only scales of rows come with a bias."""
    codes, scales, values = eight_bits(n, k, is_float=is_float, of_rows=of_rows)
    x, offset = harness.random(m, k, padded=True), harness.random(1, n)
    s, b = harness.random(m, r), harness.random(n, r, dtype=torch.float32)
    target = targets.CARDS.get(card, targets.DEFAULT)
    for tile in plans.tiles(LORA_FORWARD_8BIT, r, harness.dtype, target, aligned=k % 16 == 0):
        bias = offset[0] if of_rows else None
        y = _fill_y(harness, x, codes, scales, bias, s, b, Plan(tile), is_float=is_float)
        assert_exact(
            y,
            lambda x, w, f, s, b, o: x @ (w * f[:, None]).to(x.dtype).t() + s @ b.t() + (o if of_rows else 0),
            *(x, values.to(x), scales.to(x.device), s, b.to(x.dtype), offset),
        )


@pytest.mark.parametrize("is_float", [True, False], ids=["float8", "int8"])
def test_a_weight_of_eight_bits_is_never_rounded(harness: Harness, is_float: bool) -> None:
    """What remains of eager's error is that of the sums and of rounding y."""
    if harness.dtype == torch.float32:
        pytest.skip("the rounding of float32 sums outweighs that of a weight")
    codes, scales, values = eight_bits(64, 128, is_float=is_float, of_rows=True)
    x, nothing = harness.random(32, 128), [harness.input(torch.zeros(each, 4)) for each in (32, 64)]
    *_, smallest = plans.tiles(LORA_FORWARD_8BIT, 4, harness.dtype, targets.CARDS["A100"])
    s, b = (each.to(harness.dtype) for each in nothing)
    y = _fill_y(harness, x, codes, scales, None, s, b, Plan(smallest), is_float=is_float)
    ratios = assert_as_exact(
        ["y"],
        [y],
        lambda tensors: [tensors[0] @ (tensors[1] * tensors[2][:, None]).to(tensors[0].dtype).t()],
        [x, values.to(x), scales.to(x.device)],
    )
    assert ratios["y"] < 0.9


def test_every_byte_is_decoded(harness: Harness) -> None:
    """Where x is the unit matrix every value is picked once, NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    x = harness.input(torch.eye(16).to(harness.dtype))
    s, b = (harness.input(torch.zeros(16, 1).to(harness.dtype)) for _ in range(2))
    *_, smallest = plans.tiles(LORA_FORWARD_8BIT, 1, harness.dtype, targets.CARDS["A100"])
    for is_float, values in ((True, FLOAT8_VALUES.nan_to_num(0)), (False, codes.view(torch.int8).float())):
        given = codes.where(codes & 0x7F != 0x7F, 0) if is_float else codes
        y = _fill_y(harness, x, given, torch.ones(1), None, s, b, Plan(smallest), is_float=is_float)
        assert torch.equal(y.cpu(), values.view(16, 16).t().to(harness.dtype))
    y = _fill_y(harness, x, codes, torch.ones(1), None, s, b, Plan(smallest), is_float=True)
    # a NaN makes its whole column one
    assert y.isnan().any(0).nonzero().flatten().tolist() == [7, 15]
    assert y[:, [7, 15]].isnan().all()
