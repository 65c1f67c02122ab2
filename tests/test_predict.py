"""The cost model against what others have published, and the choices that follow from it."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from fastlora_kernels import compiled, targets
from fastlora_kernels.choose import lora, paths, plan
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.explain import OPS, Explanation, explain
from fastlora_kernels.choose.lora import Path
from fastlora_kernels.lora.kernels import LORA_FORWARD
from fastlora_kernels.predict import occupancy
from fastlora_kernels.predict.launches import Launch, library_product, total_us
from fastlora_kernels.tile import Plan, Shape, Tile
from tests import peers

H100 = targets.find_card("H100")
# LoRAFusion's own setting on Hopper
LORAFUSION_TILE = Tile(128, 256, 64, 16, warps=8, stages=3)
SIDES = (4096, 5120, 8192)
# GiB moved forward and backward, M = 8192, r = 16, p = 0.1: LoRAFusion's repository, measured on an H100
PUBLISHED_TRAFFIC = {
    ("eager", 4096): 2.008, ("eager", 5120): 2.771, ("eager", 8192): 5.289,
    ("lorafusion", 4096): 1.258, ("lorafusion", 5120): 1.836, ("lorafusion", 8192): 4.044,
}  # fmt: skip
# TFLOP/s of cuBLAS, 16 bits: triton#2339 and FBGEMM#2766 (H100), lorafusion#8 (H100 NVL), triton#6523 (A100)
PUBLISHED_SPEED = [
    ("H100", 2048, 2048, 2048, 515), ("H100", 2048, 4096, 4096, 613), ("H100", 2048, 8192, 8192, 721),
    ("H100", 6144, 8192, 8192, 754), ("H100 NVL", 4096, 4096, 4096, 494), ("A100", 2048, 2048, 2048, 143),
    ("A100", 2304, 2304, 2304, 160), ("A100", 2816, 2816, 2816, 158),
]  # fmt: skip


def square(side: int, rows: int = 8192) -> Shape:
    return Shape(rows, side, side, 16)


def launches_of(peer: str, side: int) -> list[Launch]:
    if peer == "eager":
        return peers.eager(square(side), 2, H100, dropping=True)
    return peers.lorafusion(square(side), 2, H100, LORAFUSION_TILE)


@pytest.mark.parametrize(("peer", "side"), PUBLISHED_TRAFFIC, ids=str)
def test_traffic_agrees_with_what_was_measured(peer: str, side: int) -> None:
    moved = sum(launch.bytes for launch in launches_of(peer, side)) / 2**30
    assert moved == pytest.approx(PUBLISHED_TRAFFIC[peer, side], rel=0.06)


@pytest.mark.parametrize(("card", "m", "n", "k", "tflops"), PUBLISHED_SPEED)
def test_library_times_agree_with_published_ones(card: str, m: int, n: int, k: int, tflops: float) -> None:
    launch = library_product("x·Wᵀ", m, n, k, 2, targets.find_card(card))
    assert total_us([launch]) == pytest.approx(2 * m * n * k / tflops / 1e6, rel=0.15)


def test_a_fused_product_costs_what_lorafusions_does_over_the_bare_one() -> None:
    """lorafusion#8, 4096³ on an H100 NVL: 0.284 and 0.293 ms against 0.277 to 0.279 ms."""
    card = targets.find_card("H100 NVL")
    forward = peers.lorafusion(square(4096, rows=4096), 2, card, LORAFUSION_TILE)[2]
    bare = library_product("x·Wᵀ", 4096, 4096, 4096, 2, card)
    assert 1.02 <= forward.microseconds / bare.microseconds <= 1.07


def test_lorafusions_gain_over_eager_is_the_published_one() -> None:
    """Its paper: 1.27 times on average, 1.39 at best."""
    gains = [
        total_us(launches_of("eager", side)) / total_us(launches_of("lorafusion", side)) for side in SIDES
    ]
    assert all(1.15 <= gain <= 1.39 for gain in gains), gains


def flops_of(shape: Shape) -> float:
    """Of the layer and its low-rank path, forward and backward without the frozen weight's gradient."""
    m, n, k, r = shape.m, shape.n, shape.k, shape.r
    return 4.0 * m * n * k + 6.0 * m * r * (n + k)


@pytest.mark.parametrize("path", ["split", "single", "epilogue", "library"])
def test_every_path_has_the_flops_of_the_formula(path: Path) -> None:
    shape = Shape(512, 768, 1024, 16)
    call = Call(shape, torch.bfloat16, H100, dropping=False)
    launches = lora.forward(path, call) + lora.backward("split" if path == "single" else path, call)
    assert sum(launch.flops for launch in launches) == pytest.approx(flops_of(shape))


def test_bytes_of_a_call_that_the_cache_holds() -> None:
    """x three times (S, y, dA), dY and W twice, y, dX, S and dS; adapters and their gradients in fp32."""
    m, n, k, r = 512, 768, 1024, 16
    call = Call(Shape(m, n, k, r), torch.bfloat16, H100, dropping=False)
    moved = sum(launch.bytes for launch in lora.forward("split", call) + lora.backward("split", call))
    large = 2 * (3 * m * k + 2 * m * n + 2 * n * k + m * n + m * k)
    small = 2 * 5 * m * r + 4 * r * (n + k) * 2
    assert moved == pytest.approx(large + small, rel=0.01)


def test_the_single_launch_reads_no_more_than_it_has_to() -> None:
    """One row: W, and little beside it; A is there once, not once for every tile of columns."""
    call = Call(Shape(1, 4096, 4096, 16), torch.bfloat16, H100, dropping=False)
    (launch,) = lora.forward("single", call)
    assert launch.bytes == pytest.approx(4096 * 4096 * 2, rel=0.1)


@pytest.mark.parametrize("card", targets.CARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dropping", [False, True])
def test_dora_goes_backward_as_lora_does(dropping: bool, dtype: torch.dtype, card: str) -> None:
    """The op's backward pass doesn't know which of the two it belongs to."""
    for shape in (square(4096), Shape(64, 768, 3072, 8)):
        chosen = [
            paths.choose_path("backward", shape, dtype, targets.CARDS[card], dropping=dropping, dora=dora)
            for dora in (False, True)
        ]
        assert chosen[0] == chosen[1]


def predicted(side: int) -> Explanation:
    return explain("lora_linear", square(side), torch.bfloat16, H100, dropout=0.1)


@pytest.mark.parametrize("side", SIDES)
def test_predicted_overhead_over_the_frozen_layer(side: int) -> None:
    """At most 1.10, and ahead of LoRAFusion by the same model."""
    found = predicted(side)
    ahead = total_us(launches_of("lorafusion", side)) / found.ceiling_us
    assert found.overhead <= 1.10
    assert found.overhead < ahead


@pytest.mark.parametrize("card", targets.CARDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        square(4096),
        Shape(1, 768, 768, 8),
        Shape(333, 3072, 768, 256),
        Shape(64, 1000, 515, 16, aligned=False),
    ],
    ids=str,
)
def test_every_call_gets_a_path(shape: Shape, dtype: torch.dtype, dropout: float, op: str, card: str) -> None:
    if op == "adapter":
        shape = Shape(shape.m, shape.k, shape.k, shape.r, aligned=shape.aligned)
    found = explain(op, shape, dtype, targets.CARDS[card], dropout=dropout)  # type: ignore[arg-type]
    assert found.predicted_us > 0
    assert found.bytes > 0
    for part, chosen in (("forward", found.forward), ("backward", found.backward)):
        others = found.rejected[part]  # type: ignore[index]
        assert all(each.refused or each.microseconds >= chosen.microseconds for each in others)
        assert not chosen.refused
        names = {chosen.path, *(each.path for each in others)}
        assert names == set(paths.ADAPTER_PATHS if op == "adapter" else paths.PATHS)


def test_launches_decide_where_rows_are_few() -> None:
    """One row: as few launches as there can be; many: fused."""
    few = Call(Shape(1, 4096, 4096, 16), torch.bfloat16, H100, dropping=False)
    many = Call(square(4096), torch.bfloat16, H100, dropping=False)
    assert paths.fastest(paths.candidates("forward", few)).path in ("single", "library")
    assert paths.fastest(paths.candidates("forward", many)).path == "split"


def test_more_work_never_takes_less_time() -> None:
    times = [predicted_us(Shape(m, 4096, 4096, 16)) for m in (16, 128, 1024, 8192, 65536)]
    times += [predicted_us(Shape(65536, 8192, 4096, 16)), predicted_us(Shape(65536, 8192, 8192, 64))]
    assert times == sorted(times)


def predicted_us(shape: Shape) -> float:
    return explain("lora_linear", shape, torch.bfloat16, H100).predicted_us


def test_a_choice_is_made_once() -> None:
    def choose() -> tuple[str, Plan]:
        path = paths.choose_path("forward", square(4096), torch.bfloat16, H100, dropping=True)
        return path, plan.choose(LORA_FORWARD, square(4096), torch.bfloat16, H100)

    first = choose()
    made = paths.choose_path.cache_info().misses, plan.choose.cache_info().misses
    assert choose() == first
    assert (paths.choose_path.cache_info().misses, plan.choose.cache_info().misses) == made


@pytest.mark.parametrize("card", [name for name, card in targets.CARDS.items() if not card.is_amd])
def test_registers_are_known_of_every_tile(card: str) -> None:
    """Of the card's own code, else of that which it shares: RTX 50 has a tile that its relatives lack."""
    target, names = targets.CARDS[card], {torch.bfloat16: "bf16", torch.float32: "fp32"}
    for kernel, dtype, rank in product(plan.KERNELS, names, (8, 16, 64)):
        for tile in plan.tiles(kernel, rank, dtype, target):
            assert occupancy._find(kernel.name, target.name, names[dtype], tile, False) is not None, tile


@pytest.mark.parametrize(("card", "warps"), [("A100", 64), ("RTX 3090", 48), ("RTX 5090", 48), ("H100", 64)])
def test_a_multiprocessor_holds_as_many_warps_as_cuda_lets_it(
    card: str, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neither registers nor shared memory bind: CUDA programming guide, compute capabilities."""
    row = replace(compiled.committed()[1][0], registers=32, shared_bytes=0)
    monkeypatch.setattr(occupancy, "_find", lambda *_: row)
    tile, target = Tile(64, 128, 1, 16, warps=4, stages=2), targets.CARDS[card]
    at_once = occupancy.programs_at_once(LORA_FORWARD.name, tile, torch.bfloat16, target, dropping=False)
    assert at_once * tile.warps == warps


def test_nothing_is_known_of_an_unknown_gpu() -> None:
    found = explain("lora_linear", square(4096), torch.bfloat16, targets.DEFAULT, dropout=0.1)
    assert found.path == "library"
    assert {each.refused for each in found.rejected["forward"]} == {"no tiles are pinned for this GPU"}


@pytest.mark.parametrize(
    ("shape", "dtype", "dropout", "op", "message"),
    [
        (Shape(0, 16, 16, 1), torch.bfloat16, 0.0, "lora_linear", "at least 1 for rows, got 0"),
        (square(16), torch.float64, 0.0, "lora_linear", "got torch.float64"),
        (square(16), torch.bfloat16, 1.0, "lora_linear", r"in \[0, 1\), got 1.0"),
        (square(16), torch.bfloat16, 0.0, "lora", "expected an op out of lora_linear"),
    ],
    ids=["rows", "dtype", "dropout", "op"],
)
def test_bad_input(shape: Shape, dtype: torch.dtype, dropout: float, op: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(op, shape, dtype, H100, dropout=dropout)  # type: ignore[arg-type]


def test_gpus_are_known_however_they_are_written() -> None:
    assert targets.find_card("rtx4090") is targets.CARDS["RTX 4090"]
    assert targets.find_card("SM_90") is H100
    with pytest.raises(ValueError, match=r"did you mean 'H100'\? expected a GPU out of A100.*got 'H10'"):
        targets.find_card("H10")
