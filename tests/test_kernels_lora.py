"""Each kernel against float64, its inputs between NaN and its outputs between canaries."""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora import kernels
from fastlora_kernels.lora.backward import lora_grad_a, lora_grad_s_b, lora_grad_x
from fastlora_kernels.lora.dora import dora_grad_product, dora_weight_norm
from fastlora_kernels.lora.down import lora_down
from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.lora.grad_x_a import lora_grad_x_a
from fastlora_kernels.partials import sum_partials, sum_two_partials
from fastlora_kernels.tile import Plan, Shape, cdiv
from tests.cases import cases
from tests.kernel_harness import Harness, assert_exact
from tests.lora_yardstick import unpack_mask

# every axis at 1, around the tile of 32, odd, and several tiles: several at once, and then the others ragged
BASE = Shape(m=33, n=37, k=41, r=5)
AXES = {"m": (1, 31, 32, 77), "n": (1, 31, 32, 77), "k": (1, 31, 64, 77), "r": (1, 16, 17, 33, 64)}


def along(axes: dict[str, tuple[int, ...]]) -> list[Shape]:
    """The base with another size on one axis after the other."""
    return [Shape(**(asdict(BASE) | {axis: size})) for axis in axes for size in axes[axis]]


QUICK_SHAPES = [BASE, Shape(m=1, n=77, k=64, r=17), Shape(m=77, n=1, k=1, r=64), Shape(m=32, n=32, k=77, r=1)]
MORE_SHAPES = along(AXES)
SHAPES = cases(QUICK_SHAPES, MORE_SHAPES)


def shape_id(shape: Shape) -> str:
    return f"m{shape.m}-n{shape.n}-k{shape.k}-r{shape.r}"


def choose(kernel: Kernel, shape: Shape, dtype: torch.dtype, splits: int = 1) -> Plan:
    return Plan(plans.choose(kernel, shape, dtype, targets.DEFAULT).tile, splits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_down(harness: Harness, shape: Shape, splits: int) -> None:
    x, a = harness.random(shape.m, shape.k, padded=True), harness.random(shape.r, shape.k)
    partial = harness.output(splits, shape.m, shape.r, dtype=torch.float32)
    plan = choose(kernels.LORA_DOWN, shape, harness.dtype, splits)
    lora_down(x, a, None, None, partial, drop_threshold=1, scale=1.5, plan=plan)
    assert_exact(partial.sum(0), lambda x, a: 1.5 * x @ a.t(), x, a)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_down_dropout(harness: Harness, shape: Shape, splits: int) -> None:
    x = harness.random(shape.m, shape.k, padded=True)
    a = harness.random(shape.r, shape.k, dtype=torch.float32)
    partial = harness.output(splits, shape.m, shape.r, dtype=torch.float32)
    mask = harness.output(shape.m, cdiv(shape.k, 32), dtype=torch.int32)
    seed = torch.tensor([77], device=harness.device)
    plan = choose(kernels.LORA_DOWN, shape, harness.dtype, splits)
    lora_down(x, a, seed, mask, partial, drop_threshold=20000, scale=1.0, plan=plan)
    keep = unpack_mask(mask, shape.k)
    assert_exact(partial.sum(0), lambda x, a: (x * keep) @ a.t(), x, a.to(harness.dtype))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_forward(harness: Harness, shape: Shape, bias: bool) -> None:
    x, weight = harness.random(shape.m, shape.k, padded=True), harness.random(shape.n, shape.k, padded=True)
    s, b = harness.random(shape.m, shape.r), harness.random(shape.n, shape.r)
    offset = harness.random(1, shape.n)
    y = harness.output(shape.m, shape.n)
    plan = choose(kernels.LORA_FORWARD, shape, harness.dtype)
    lora_forward(x, weight, offset[0] if bias else None, s, b, y, plan=plan)
    assert_exact(y, lambda x, w, s, b, o: x @ w.t() + s @ b.t() + (o if bias else 0), x, weight, s, b, offset)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_forward_into_columns_of_a_wider_matrix(harness: Harness, shape: Shape) -> None:
    x, weight = harness.random(shape.m, shape.k, padded=True), harness.random(shape.n, shape.k, padded=True)
    s, b = harness.random(shape.m, shape.r), harness.random(shape.n, shape.r)
    wider = harness.output(shape.m, shape.n + 5)
    y = wider[:, 2 : 2 + shape.n]
    lora_forward(x, weight, None, s, b, y, plan=choose(kernels.LORA_FORWARD, shape, harness.dtype))
    assert_exact(y, lambda x, w, s, b: x @ w.t() + s @ b.t(), x, weight, s, b)
    # what is beside them was never written
    assert torch.cat([wider[:, :2], wider[:, 2 + shape.n :]], 1).isnan().all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_dora_forward(harness: Harness, shape: Shape, bias: bool) -> None:
    x, weight = harness.random(shape.m, shape.k, padded=True), harness.random(shape.n, shape.k, padded=True)
    s, b = harness.random(shape.m, shape.r), harness.random(shape.n, shape.r)
    offset, factor = harness.random(1, shape.n), harness.random(1, shape.n, dtype=torch.float32)
    y, product = harness.output(shape.m, shape.n), harness.output(shape.m, shape.n)
    operands = (x, weight, offset[0] if bias else None, s, b, y)
    lora_forward(
        *operands, plan=choose(kernels.DORA_FORWARD, shape, harness.dtype), factor=factor[0], product=product
    )
    assert_exact(product, lambda x, w, s, b: x @ w.t() + s @ b.t(), x, weight, s, b)
    assert_exact(
        y,
        lambda x, w, s, b, g, o: g * (x @ w.t() + s @ b.t()) + (o if bias else 0),
        x, weight, s, b, factor, offset,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_dora_weight_norm(harness: Harness, shape: Shape) -> None:
    weight = harness.random(shape.n, shape.k, padded=True)
    a, b = harness.random(shape.r, shape.k), harness.random(shape.n, shape.r, dtype=torch.float32)
    norm = harness.output(shape.n, dtype=torch.float32)
    plan = choose(kernels.DORA_WEIGHT_NORM, shape, harness.dtype)
    dora_weight_norm(weight, a, b, norm, scale=0.5, plan=plan)
    assert_exact(norm, lambda w, a, b: (w + 0.5 * b @ a).norm(dim=1), weight, a, b)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_dora_grad_product(harness: Harness, shape: Shape, splits: int) -> None:
    dy, product = harness.random(shape.m, shape.n, padded=True), harness.random(shape.m, shape.n)
    factor = harness.random(1, shape.n, dtype=torch.float32)
    plan = choose(kernels.DORA_GRAD_PRODUCT, shape, harness.dtype, splits)
    dproduct, dfactor = harness.output(shape.m, shape.n), harness.output(splits, shape.n, dtype=torch.float32)
    dora_grad_product(dy, product, factor[0], dproduct, dfactor, plan=plan)
    assert_exact(dproduct, lambda dy, g: dy * g, dy, factor)
    assert_exact(dfactor.sum(0), lambda dy, u: (dy * u).sum(0), dy, product)
    alone = harness.output(shape.m, shape.n)
    dora_grad_product(dy, None, factor[0], alone, None, plan=plan)
    assert torch.equal(alone, dproduct)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_grad_s_b(harness: Harness, shape: Shape, splits: int) -> None:
    dy = harness.random(shape.m, shape.n, padded=True)
    s, b = harness.random(shape.m, shape.r), harness.random(shape.n, shape.r)
    plan = choose(kernels.LORA_GRAD_S_B, shape, harness.dtype, splits)
    ds = harness.output(cdiv(shape.n, plan.tile.cols), shape.m, shape.r, dtype=torch.float32)
    db = harness.output(splits, shape.n, shape.r, dtype=torch.float32)
    lora_grad_s_b(dy, s, b, ds, db, scale=0.5, plan=plan)
    assert_exact(ds.sum(0), lambda dy, b: 0.5 * dy @ b, dy, b)
    assert_exact(db.sum(0), lambda dy, s: dy.t() @ s, dy, s)


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no-dropout"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_grad_x(harness: Harness, shape: Shape, dropout: bool) -> None:
    dy, weight = harness.random(shape.m, shape.n, padded=True), harness.random(shape.n, shape.k, padded=True)
    ds, a = harness.random(shape.m, shape.r), harness.random(shape.r, shape.k)
    mask, keep = _random_mask(harness, shape)
    dx = harness.output(shape.m, shape.k)
    plan = choose(kernels.LORA_GRAD_X, shape, harness.dtype)
    lora_grad_x(dy, weight, ds, a, mask if dropout else None, dx, plan=plan)
    assert_exact(dx, lambda dy, w, ds, a: dy @ w + (ds @ a) * (keep if dropout else 1), dy, weight, ds, a)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no-dropout"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_grad_a(harness: Harness, shape: Shape, dropout: bool, splits: int) -> None:
    x, ds = harness.random(shape.m, shape.k, padded=True), harness.random(shape.m, shape.r)
    mask, keep = _random_mask(harness, shape)
    da = harness.output(splits, shape.r, shape.k, dtype=torch.float32)
    plan = choose(kernels.LORA_GRAD_A, shape, harness.dtype, splits)
    lora_grad_a(x, ds, mask if dropout else None, da, plan=plan)
    assert_exact(da.sum(0), lambda x, ds: ds.t() @ (x * (keep if dropout else 1)), x, ds)


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no-dropout"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_lora_grad_x_a(harness: Harness, shape: Shape, dropout: bool) -> None:
    dy, weight = harness.random(shape.m, shape.n, padded=True), harness.random(shape.n, shape.k, padded=True)
    x, ds = harness.random(shape.m, shape.k, padded=True), harness.random(shape.m, shape.r)
    a = harness.random(shape.r, shape.k)
    mask, keep = _random_mask(harness, shape)
    keep = keep if dropout else torch.ones_like(keep)
    dx = harness.output(shape.m, shape.k)
    da = harness.output(2, shape.r, shape.k, dtype=torch.float32)
    plan = choose(kernels.LORA_GRAD_X_A, shape, harness.dtype, splits=2)
    lora_grad_x_a(dy, weight, ds, a, mask if dropout else None, x, dx, da, plan=plan)
    assert_exact(dx, lambda dy, w, ds, a: dy @ w + (ds @ a) * keep, dy, weight, ds, a)
    assert_exact(da.sum(0), lambda x, ds: ds.t() @ (x * keep), x, ds)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025])
@pytest.mark.parametrize("parts", [0, 1, 5])
def test_sum_partials(harness: Harness, parts: int, size: int) -> None:
    partial = harness.random(parts, size, dtype=torch.float32)
    out = harness.output(size)
    sum_partials(partial, out)
    in_order = torch.zeros(size, device=harness.device)
    for part in partial:
        in_order = in_order + part
    assert torch.equal(out, in_order.to(harness.dtype))


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (1, 1025), (1024, 1)], ids=str)
def test_sum_two_partials(harness: Harness, sizes: tuple[int, int]) -> None:
    """Each as if it were alone, in its own dtype."""
    pairs, alone = [], []
    for parts, size, dtype in zip((3, 2), sizes, (harness.dtype, torch.float32), strict=True):
        partial = harness.random(parts, size, dtype=torch.float32)
        pairs.append((partial, harness.output(size, dtype=dtype)))
        alone.append(harness.output(size, dtype=dtype))
        sum_partials(partial, alone[-1])
    sum_two_partials(*pairs[0], *pairs[1])
    assert all(torch.equal(out, expected) for (_, out), expected in zip(pairs, alone, strict=True))


@pytest.mark.parametrize("target", cases(["sm_90"], ["sm_80", "sm_100", "gfx942"]))
def test_pinned_tiles_compute_the_same(target: str, kernel_device: torch.device) -> None:
    """The large tiles that GPUs get, with ranks in chunks and a ragged edge on every axis."""
    shape = Shape(m=150, n=270, k=145, r=96)
    harness = Harness(torch.float16, kernel_device)
    x, weight = harness.random(shape.m, shape.k), harness.random(shape.n, shape.k)
    s, b = harness.random(shape.m, shape.r), harness.random(shape.n, shape.r)
    dy, ds, a = harness.random(shape.m, shape.n), s, harness.random(shape.r, shape.k)
    mask, keep = _random_mask(harness, shape)
    tiles = plans.tiles(kernels.LORA_FORWARD, shape.r, harness.dtype, targets.TARGETS[target])
    for tile in (tile for tile in tiles if not tile.persistent):
        y = harness.output(shape.m, shape.n)
        lora_forward(x, weight, None, s, b, y, plan=Plan(tile))
        assert_exact(y, lambda x, w, s, b: x @ w.t() + s @ b.t(), x, weight, s, b)
        dx = harness.output(shape.m, shape.k)
        da = harness.output(2, shape.r, shape.k, dtype=torch.float32)
        lora_grad_x_a(dy, weight, ds, a, mask, x, dx, da, plan=Plan(tile, splits=2))
        assert_exact(dx, lambda dy, w, ds, a: dy @ w + (ds @ a) * keep, dy, weight, ds, a)
        assert_exact(da.sum(0), lambda x, ds: ds.t() @ (x * keep), x, ds)
    harness.assert_margins_untouched()


def test_row_offsets_pass_two_to_the_31(kernel_device: torch.device) -> None:
    """Rows so far apart that a 32-bit offset would wrap around; only the pages that are touched exist."""
    rows, columns, stride = 3, 40, 2**30 + 8
    far = torch.empty(2 * stride + columns, dtype=torch.float16, device=kernel_device)
    x = far.as_strided((rows, columns), (stride, 1))
    x.copy_(torch.randn(rows, columns))
    weight, s, b = (torch.randn(n, k).to(x) for n, k in ((50, columns), (rows, 4), (50, 4)))
    y = torch.empty(rows, 50).to(x)
    plan = choose(kernels.LORA_FORWARD, Shape(m=rows, n=50, k=columns, r=4), x.dtype)
    lora_forward(x, weight, None, s, b, y, plan=plan)
    assert_exact(y, lambda x, w, s, b: x @ w.t() + s @ b.t(), x.clone(), weight, s, b)


def _random_mask(harness: Harness, shape: Shape) -> tuple[Tensor, Tensor]:
    words = torch.randint(-(2**31), 2**31, (shape.m, cdiv(shape.k, 32)), dtype=torch.int64)
    mask = words.to(harness.device, torch.int32)
    return mask, unpack_mask(mask, shape.k)
