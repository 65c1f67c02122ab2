"""The kernels of the other paths, one launch and a library's epilogue, held to float64 as the split are."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.epilogue import lora_add
from fastlora_kernels.lora.single import lora_forward_single
from fastlora_kernels.tile import Plan, Shape
from tests.cases import cases
from tests.kernel_harness import Harness, assert_exact
from tests.test_kernels_lora import MORE_SHAPES, QUICK_SHAPES, SHAPES, choose, shape_id

SCALE = 1.5


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_forward_single(harness: Harness, shape: Shape) -> None:
    """S as lora_down leaves it, in x's dtype; y from that very S. A single rank goes without a bias."""
    bias = shape.r > 1
    x, weight = harness.random(shape.m, shape.k, padded=True), harness.random(shape.n, shape.k, padded=True)
    a, b = harness.random(shape.r, shape.k), harness.random(shape.n, shape.r)
    offset = harness.random(1, shape.n)
    s, y = harness.output(shape.m, shape.r), harness.output(shape.m, shape.n)
    plan = choose(kernels.LORA_FORWARD_SINGLE, shape, harness.dtype)
    operands = (x, weight, offset[0] if bias else None, a, b, s, y)
    lora_forward_single(*operands, scale=SCALE, plan=plan)
    assert_exact(s, lambda x, a: SCALE * (x @ a.t()), x, a)
    assert_exact(y, lambda x, w, s, b, o: x @ w.t() + s @ b.t() + (o if bias else 0), x, weight, s, b, offset)


def test_single_rounds_fp32_adapters_once(harness: Harness) -> None:
    x, weight = harness.random(33, 41), harness.random(37, 41)
    a, b = harness.random(5, 41, dtype=torch.float32), harness.random(37, 5, dtype=torch.float32)
    s, y = harness.output(33, 5), harness.output(33, 37)
    plan = choose(kernels.LORA_FORWARD_SINGLE, Shape(m=33, n=37, k=41, r=5), harness.dtype)
    lora_forward_single(x, weight, None, a, b, s, y, scale=SCALE, plan=plan)
    a, b = a.to(harness.dtype), b.to(harness.dtype)
    assert_exact(s, lambda x, a: SCALE * (x @ a.t()), x, a)
    assert_exact(y, lambda x, w, s, b: x @ w.t() + s @ b.t(), x, weight, s, b)


@pytest.mark.parametrize("rank", [1, 5, 16, 17, 33, 48, 64])
def test_the_single_launch_holds_the_whole_rank(rank: int) -> None:
    for target in (*targets.TARGETS.values(), targets.DEFAULT):
        for dtype in (torch.bfloat16, torch.float32):
            for aligned in (True, False):
                for tile in plans.tiles(kernels.LORA_FORWARD_SINGLE, rank, dtype, target, aligned=aligned):
                    assert rank <= tile.rank <= max(16, 2 * rank - 1)


@pytest.mark.parametrize(
    ("shape", "transposed", "dropout"),
    cases(
        [*product(QUICK_SHAPES, [True], [False]), *product(QUICK_SHAPES, [False], [True])],
        [
            *product(MORE_SHAPES, [True], [False]),
            *product(MORE_SHAPES, [False], [True]),
            (QUICK_SHAPES[0], False, False),
        ],
    ),
    ids=lambda value: shape_id(value) if isinstance(value, Shape) else str(value),
)
def test_lora_add(harness: Harness, shape: Shape, transposed: bool, dropout: bool) -> None:
    """Into what is there, rounded once; where the mask drops, what is there stays bit for bit."""
    before, left = harness.random(shape.m, shape.n), harness.random(shape.m, shape.r)
    right = harness.random(*((shape.n, shape.r) if transposed else (shape.r, shape.n)))
    mask, keep = harness.mask(shape.m, shape.n)
    keep = keep if dropout else torch.ones_like(keep)
    out = harness.output(shape.m, shape.n)
    out.copy_(before)
    plan = choose(kernels.LORA_ADD, shape, harness.dtype)
    lora_add(left, right, mask if dropout else None, out, transposed=transposed, plan=plan)
    assert_exact(
        out,
        lambda before, left, right: before + (left @ (right.t() if transposed else right)) * keep,
        before, left, right,
    )  # fmt: skip
    assert torch.equal(out[~keep], before[~keep])


def test_lora_add_into_columns_of_a_wider_matrix(harness: Harness) -> None:
    shape = Shape(m=33, n=70, k=1, r=5)
    wide, left, right = (harness.random(*size) for size in ((33, 150), (33, 5), (70, 5)))
    before, plan = wide.clone(), choose(kernels.LORA_ADD, shape, harness.dtype)
    lora_add(left, right, None, wide[:, 7:77], transposed=True, plan=plan)
    assert_exact(wide[:, 7:77], lambda o, left, right: o + left @ right.t(), before[:, 7:77], left, right)
    for untouched in (slice(0, 7), slice(77, 150)):
        assert torch.equal(wide[:, untouched], before[:, untouched])


@pytest.mark.parametrize("target", cases(["sm_90"], ["sm_80"]))
def test_pinned_tiles_compute_the_same(target: str, kernel_device: torch.device) -> None:
    """The large tiles that GPUs get, with a ragged edge on every axis."""
    shape = Shape(m=150, n=270, k=145, r=96)
    harness = Harness(torch.float16, kernel_device)
    x, weight = harness.random(shape.m, shape.k), harness.random(shape.n, shape.k)
    for tile in plans.tiles(kernels.LORA_FORWARD_SINGLE, 40, harness.dtype, targets.TARGETS[target]):
        a, b = harness.random(40, shape.k), harness.random(shape.n, 40)
        s, y = harness.output(shape.m, 40), harness.output(shape.m, shape.n)
        lora_forward_single(x, weight, None, a, b, s, y, scale=0.5, plan=Plan(tile))
        assert_exact(s, lambda x, a: 0.5 * (x @ a.t()), x, a)
        assert_exact(y, lambda x, w, s, b: x @ w.t() + s @ b.t(), x, weight, s, b)
    left, right = harness.random(shape.m, shape.r), harness.random(shape.r, shape.n)
    before, (mask, keep) = harness.random(shape.m, shape.n), harness.mask(shape.m, shape.n)
    for tile in plans.tiles(kernels.LORA_ADD, shape.r, harness.dtype, targets.TARGETS[target]):
        out = harness.output(shape.m, shape.n)
        out.copy_(before)
        lora_add(left, right, mask, out, transposed=False, plan=Plan(tile))
        assert_exact(out, lambda o, left, right: o + (left @ right) * keep, before, left, right)
    harness.assert_margins_untouched()
