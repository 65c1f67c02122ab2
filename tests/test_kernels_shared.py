"""S and dX of layers that share their input, of a launch each, against float64, between NaN and canaries."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.shared import shared_plan
from fastlora_kernels.choose.shared_forward import shared_down_plan
from fastlora_kernels.shared.down import shared_down
from fastlora_kernels.shared.grad_x import shared_grad_x
from fastlora_kernels.shared.kernels import SHARED_DOWN, SHARED_GRAD_X
from fastlora_kernels.tile import Plan, Shape, cdiv
from tests.cases import cases
from tests.kernel_harness import Harness, assert_exact, shared_dx
from tests.lora_yardstick import unpack_mask
from tests.philox import mask_uniforms

# outputs and ranks of each layer; every axis at 1, around the tile of 32, odd, and several tiles
SIZES = cases(
    [(33, 41, [(37, 5), (70, 16), (1, 33)])],
    [
        (77, 64, [(32, 16), (31, 1)]),
        (1, 1, [(1, 1), (1, 1), (1, 1)]),
        (32, 31, [(64, 17), (33, 64), (96, 8)]),
        (31, 77, [(5, 32), (37, 16), (37, 16)]),
        (64, 96, [(1, 40), (77, 5)]),
    ],
)


# of each layer
SEEDS, THRESHOLDS, SCALES = (77, 2**40 + 1, 5), (20000, 1, 60000), (1.5, 1.0, 0.25)


def assert_s(harness: Harness, m: int, k: int, ranks: Sequence[int], *, dropout: bool, plan: Plan) -> None:
    """S of layers is as exact as each product in torch, of masks that are NumPy's."""
    x, masks = harness.random(m, k, padded=True), list[Tensor]()
    lora_as = [harness.random(r, k, dtype=torch.float32) for r in ranks]
    tensors = list[Tensor | None]()
    for a, seed in zip(lora_as, SEEDS, strict=False):
        masks.append(harness.output(m, cdiv(k, 32), dtype=torch.int32))
        drawn = (torch.tensor([seed], device=harness.device), masks[-1]) if dropout else (None, None)
        tensors += a, *drawn
    tensors += [None] * (9 - len(tensors))
    partial = harness.output(plan.splits, m * sum(ranks), dtype=torch.float32)
    count = len(ranks)
    settings: Any = {"drop_thresholds": THRESHOLDS[:count], "scales": SCALES[:count]}
    shared_down(x, partial, *tensors, **settings, plan=plan)
    all_s = partial.sum(0).split([m * r for r in ranks])
    for i, (a, s, scale) in enumerate(zip(lora_as, all_s, SCALES, strict=False)):
        keep = torch.ones(m, k, dtype=torch.bool, device=harness.device)
        if dropout:
            keep = torch.from_numpy(mask_uniforms(SEEDS[i], m, k) >= THRESHOLDS[i]).to(harness.device)
            assert torch.equal(unpack_mask(masks[i], k), keep)
        low = a.to(harness.dtype)
        assert_exact(s.view(m, -1), _low_rank(keep, scale), x, low)
    harness.assert_margins_untouched()


def _low_rank(keep: Tensor, scale: float) -> Callable[..., Tensor]:
    return lambda x, a: scale * (x * keep) @ a.t()


@pytest.mark.parametrize("splits", cases([2], [1]))
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no-dropout"])
@pytest.mark.parametrize(("m", "k", "sizes"), SIZES)
def test_shared_down(
    harness: Harness, m: int, k: int, sizes: list[tuple[int, int]], dropout: bool, splits: int
) -> None:
    shapes = [Shape(m=m, n=n, k=k, r=r) for n, r in sizes]
    tile = shared_down_plan(shapes, harness.dtype, targets.DEFAULT).tile
    plan = Plan(tile, splits)
    assert_s(harness, m, k, [r for _, r in sizes], dropout=dropout, plan=plan)


@pytest.mark.parametrize("target", cases(["sm_90"], ["sm_80", "sm_100", "gfx942"]))
def test_the_pinned_tile_of_s_computes_the_same(target: str, kernel_device: torch.device) -> None:
    """With ranks in chunks, of which the first alone stores the masks, and a ragged edge on every axis."""
    harness = Harness(torch.float16, kernel_device)
    (tile,) = plans.tiles(SHARED_DOWN, 96, harness.dtype, targets.TARGETS[target])
    assert tile.rank < 96
    assert_s(harness, 150, 145, [96, 40], dropout=True, plan=Plan(tile, 2))


def assert_dx(harness: Harness, m: int, k: int, sizes: Sequence[tuple[int, int]], **options: Any) -> None:
    """dX of layers whose matrices have margins is as exact as the same sum of products in torch."""
    tensors, keeps, dx = list[Tensor | None](), list[Tensor](), harness.output(m, k)
    dropout, tile = options["dropout"], options["tile"]
    for n, r in sizes:
        mask, keep = harness.mask(m, k)
        tensors += harness.random(m, n, padded=True), harness.random(n, k, padded=True), harness.random(m, r)
        tensors += harness.random(r, k, dtype=options.get("adapter_dtype")), mask if dropout else None
        keeps.append(keep if dropout else torch.ones_like(keep))
    shared_grad_x(dx, *tensors, *[None] * (15 - len(tensors)), plan=Plan(tile))
    operands = [each.to(dx.dtype) for i, each in enumerate(tensors) if each is not None and i % 5 < 4]
    assert_exact(dx, shared_dx(keeps), *operands)


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no-dropout"])
@pytest.mark.parametrize(("m", "k", "sizes"), SIZES)
def test_shared_grad_x(harness: Harness, m: int, k: int, sizes: list[tuple[int, int]], dropout: bool) -> None:
    shapes = [Shape(m=m, n=n, k=k, r=r) for n, r in sizes]
    tile = shared_plan(shapes, harness.dtype, targets.DEFAULT).tile
    assert_dx(harness, m, k, sizes, dropout=dropout, tile=tile, adapter_dtype=torch.float32)


@pytest.mark.parametrize("target", cases(["sm_90"], ["sm_80", "sm_100", "gfx942"]))
def test_the_pinned_tile_computes_the_same(target: str, kernel_device: torch.device) -> None:
    """The large tile that GPUs get, with ranks in chunks and a ragged edge on every axis."""
    harness = Harness(torch.float16, kernel_device)
    (tile,) = plans.tiles(SHARED_GRAD_X, 96, harness.dtype, targets.TARGETS[target])
    assert_dx(harness, 150, 145, [(130, 96), (70, 40)], dropout=True, tile=tile)
    harness.assert_margins_untouched()


def test_a_rank_that_16_does_not_divide_settles_the_tile() -> None:
    """Whichever layer it is of."""
    h100 = targets.TARGETS["sm_90"]
    for ranks, at_a_time in (((16, 64, 32), 32), ((16, 8, 64), 16), ((64, 16, 40), 16), ((16, 16), 32)):
        shapes = [Shape(m=4096, n=1024, k=1024, r=r) for r in ranks]
        assert shared_plan(shapes, torch.bfloat16, h100).tile.rank == at_a_time
