"""The kernels that read through tensor descriptors, against float64, and the ops that launch them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

import fastlora
from fastlora.ops.prepared import Memory
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora.kernels import LORA_FORWARD, LORA_GRAD_X_A
from fastlora_kernels.lora.persistent import lora_forward_persistent, lora_grad_x_a_persistent
from fastlora_kernels.tile import Plan, Shape, Tile, cdiv
from tests.cases import cases
from tests.kernel_harness import Harness, assert_exact
from tests.lora_yardstick import unpack_mask

# descriptors want rows that begin at multiples of 16 bytes; every axis at one tile, ragged, and several
TILE = Tile(rows=32, cols=64, depth=32, rank=16, warps=4, stages=2, persistent=True)
SHAPES = [
    Shape(m=33, n=80, k=144, r=5),
    Shape(m=1, n=16, k=16, r=1),
    Shape(m=32, n=64, k=64, r=16),
    Shape(m=131, n=48, k=80, r=33),
]
# some tiles for each program, and more programs than tiles
PROGRAMS = (3, 1000)
each_shape = pytest.mark.parametrize(
    "shape", cases([SHAPES[0], SHAPES[-1]], SHAPES[1:-1]), ids=lambda s: f"m{s.m}-n{s.n}-k{s.k}-r{s.r}"
)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def harness(request: pytest.FixtureRequest, kernel_device: torch.device) -> Iterator[Harness]:
    if kernel_device.type == "cuda" and targets.detect(kernel_device).tiles not in ("sm_90", "sm_100"):
        pytest.skip("this GPU has no tensor descriptors")
    made = Harness(request.param, kernel_device)
    yield made
    made.assert_margins_untouched()


def padded(harness: Harness, rows: int, cols: int) -> Tensor:
    """NaN between the rows, which stay at multiples of 16 bytes."""
    return harness.input(torch.randn(rows, cols).to(harness.device, harness.dtype), row_stride=cols + 24)


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@each_shape
def test_lora_forward_persistent(harness: Harness, shape: Shape, bias: bool, programs: int) -> None:
    _check_forward(harness, shape, TILE, programs, bias=bias)


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no-dropout"])
@each_shape
def test_lora_grad_x_a_persistent(harness: Harness, shape: Shape, dropout: bool, programs: int) -> None:
    _check_grad_x_a(harness, shape, TILE, programs, dropout=dropout)


@pytest.mark.parametrize("target", cases(["sm_90"], ["sm_100"]))
def test_pinned_tiles_compute_the_same(target: str, kernel_device: torch.device) -> None:
    """The large tiles that GPUs get, with ranks in chunks and a ragged edge on every axis."""
    shape = Shape(m=150, n=272, k=144, r=96)
    harness = Harness(torch.float16, kernel_device)
    tiles = plans.tiles(LORA_GRAD_X_A, shape.r, harness.dtype, targets.TARGETS[target])
    for tile in (tile for tile in tiles if tile.persistent):
        _check_forward(harness, shape, tile, programs=3, bias=True)
        _check_grad_x_a(harness, shape, tile, programs=3, dropout=True)
    harness.assert_margins_untouched()


def test_only_aligned_16_bit_rows_get_descriptors() -> None:
    for target in targets.TARGETS.values():
        for kernel in plans.KERNELS:
            for dtype in (torch.float32, torch.bfloat16):
                for aligned in (True, False):
                    found = any(t.persistent for t in plans.tiles(kernel, 16, dtype, target, aligned=aligned))
                    fitting = target.tiles in ("sm_90", "sm_100") and dtype != torch.float32 and aligned
                    assert found == (fitting and kernel in (LORA_FORWARD, LORA_GRAD_X_A))


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["no-dropout", "dropout"])
def test_the_op_launches_what_the_plan_says(
    dropout: float, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plans but for a persistent tile: the same output and gradients."""
    m, n, k, r = 40, 64, 96, 8
    values = [torch.randn(size).to(kernel_device, torch.float16) for size in ((m, k), (n, k), (r, k), (n, r))]

    # other paths launch other kernels
    monkeypatch.setattr("fastlora.ops.kernel_paths.choose", lambda *_, **__: Choice("split"))

    def run() -> list[Tensor]:
        x, weight, a, b = (value.clone() for value in values)
        for tensor in (x, a, b):
            tensor.requires_grad_()
        torch.manual_seed(1)
        with fastlora.use_backend("triton"):
            y = fastlora.functional.lora_linear(x, weight, None, a, b, scaling=0.5, dropout=dropout)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, a, b))]

    expected, launched = run(), []
    choose = plans.choose

    def persistent(kernel: Kernel, *arguments: Any, **options: Any) -> Plan:
        plan = choose(kernel, *arguments, **options)
        if kernel not in (LORA_FORWARD, LORA_GRAD_X_A):
            return plan
        launched.append(kernel)
        return replace(plan, tile=TILE)

    monkeypatch.setattr(plans, "choose", persistent)
    Memory.forget_all()
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
    assert launched == [LORA_FORWARD, LORA_GRAD_X_A]


def _check_forward(harness: Harness, shape: Shape, tile: Tile, programs: int, *, bias: bool) -> None:
    x, weight = padded(harness, shape.m, shape.k), padded(harness, shape.n, shape.k)
    s, b = harness.random(shape.m, shape.r), harness.random(shape.n, shape.r)
    offset = harness.random(1, shape.n)
    # columns of a wider matrix
    wider = harness.output(shape.m, shape.n + 16)
    y = wider[:, : shape.n]
    lora_forward_persistent(
        x, weight, offset[0] if bias else None, s, b, y, plan=Plan(tile), multiprocessors=programs
    )
    assert wider[:, shape.n :].isnan().all()
    assert_exact(y, lambda x, w, s, b, o: x @ w.t() + s @ b.t() + (o if bias else 0), x, weight, s, b, offset)


def _check_grad_x_a(harness: Harness, shape: Shape, tile: Tile, programs: int, *, dropout: bool) -> None:
    dy, weight = padded(harness, shape.m, shape.n), padded(harness, shape.n, shape.k)
    x, ds = padded(harness, shape.m, shape.k), harness.random(shape.m, shape.r)
    a = harness.random(shape.r, shape.k)
    words = torch.randint(-(2**31), 2**31, (shape.m, cdiv(shape.k, 32)), dtype=torch.int64)
    mask = words.to(harness.device, torch.int32)
    keep = unpack_mask(mask, shape.k) if dropout else torch.ones_like(x)
    dx = harness.output(shape.m, shape.k)
    da = harness.output(2, shape.r, shape.k, dtype=torch.float32)
    lora_grad_x_a_persistent(
        dy, weight, ds, a, mask if dropout else None, x, dx, da,
        plan=Plan(tile, splits=2), multiprocessors=programs,
    )  # fmt: skip
    assert_exact(dx, lambda dy, w, ds, a: dy @ w + (ds @ a) * keep, dy, weight, ds, a)
    assert_exact(da.sum(0), lambda x, ds: ds.t() @ (x * keep), x, ds)
