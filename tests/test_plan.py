"""The launch plan: deterministic, fits every target, never an error on an unknown GPU."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="plans are for the kernels")

from fastlora_kernels import targets
from fastlora_kernels.choose import paths
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora.kernels import LORA_DOWN, LORA_FORWARD, LORA_GRAD_X_A
from fastlora_kernels.tile import Shape, Tile

LARGE = Shape(m=8192, n=4096, k=4096, r=16)
SHAPES = [LARGE, Shape(m=1, n=1, k=1, r=1), Shape(m=100, n=768, k=3072, r=256), Shape(m=0, n=0, k=0, r=1)]
UNKNOWN = replace(targets.DEFAULT, name="sm_999", multiprocessors=7, shared_bytes=49_152)


@pytest.mark.parametrize(
    "target", [*targets.TARGETS.values(), targets.DEFAULT, UNKNOWN], ids=lambda t: t.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_plan_fits(target: targets.Target, dtype: torch.dtype, shape: Shape) -> None:
    for kernel in plans.KERNELS:
        plan = plans.choose(kernel, shape, dtype, target)
        tile = plan.tile
        assert plan == plans.choose.__wrapped__(kernel, shape, dtype, target)
        assert plan.splits >= 1
        assert tile.stages >= 1
        assert (tile.rows + tile.cols) * tile.depth * dtype.itemsize <= target.shared_bytes
        assert tile in plans.tiles(kernel, shape.r, dtype, target, aligned=shape.aligned)


def test_choices_on_an_h100() -> None:
    """Changing what a usual shape gets is a decision, not a side effect."""
    forward = plans.choose(LORA_FORWARD, LARGE, torch.bfloat16, targets.TARGETS["sm_90"])
    assert forward.tile == Tile(128, 256, 64, 16, warps=8, stages=4, persistent=True)
    small = plans.choose(LORA_FORWARD, Shape(64, 512, 512, 16), torch.bfloat16, targets.TARGETS["sm_90"])
    assert (small.tile.rows, small.tile.cols) == (64, 64)
    down = plans.choose(LORA_DOWN, Shape(256, 4096, 4096, 16), torch.bfloat16, targets.TARGETS["sm_90"])
    assert down.splits > 1


@pytest.mark.parametrize("target", targets.CARDS.values(), ids=lambda target: target.card)
@pytest.mark.parametrize("kernel", plans.KERNELS, ids=lambda kernel: kernel.name)
def test_a_measured_tile_is_taken_as_it_is(kernel: Kernel, target: targets.Target) -> None:
    for tile in plans.tiles(kernel, 16, torch.bfloat16, target):
        assert plans.choose(kernel, LARGE, torch.bfloat16, target, tile=tile).tile == tile


@pytest.mark.parametrize("kernel", [LORA_FORWARD, LORA_GRAD_X_A], ids=lambda kernel: kernel.name)
def test_no_descriptor_reaches_two_gib(kernel: Kernel) -> None:
    """Not even where such a tile was measured, with fewer rows."""
    card, most = targets.TARGETS["sm_90"], 2**30 // 14336
    persistent = plans.choose(kernel, Shape(most, 14336, 4096, 16), torch.bfloat16, card).tile
    assert persistent.persistent
    for measured in (None, persistent):
        large = plans.choose(kernel, Shape(most + 1, 14336, 4096, 16), torch.bfloat16, card, tile=measured)
        assert not large.tile.persistent


@pytest.mark.parametrize(
    ("shape", "dtype", "dropping", "path"),
    [
        (LARGE, torch.bfloat16, True, "split"),
        (LARGE, torch.float32, True, "epilogue"),
        (Shape(8, 4096, 4096, 16), torch.bfloat16, False, "library"),
        (Shape(8192, 4095, 4096, 16, aligned=False), torch.bfloat16, True, "library"),
        (Shape(8192, 4096, 4096, 100), torch.bfloat16, True, "library"),
        (Shape(0, 4096, 4096, 16), torch.bfloat16, False, "library"),
    ],
    ids=["large", "fp32", "few rows", "unaligned", "odd rank", "no rows"],
)
def test_path(shape: Shape, dtype: torch.dtype, dropping: bool, path: str) -> None:
    card = targets.TARGETS["sm_90"]
    assert paths.choose_path("backward", shape, dtype, card, dropping=dropping) == path
    if shape.m:
        assert paths.choose_path("backward", shape, dtype, UNKNOWN, dropping=dropping) == "library"


def test_shared_memory_limits_the_pipeline() -> None:
    little = replace(targets.TARGETS["sm_90"], name="sm_998", shared_bytes=101_376)
    stages = {tile.stages for tile in plans.tiles(LORA_FORWARD, 16, torch.bfloat16, little)}
    assert min(stages) == 1
    # a pipeline that hides nothing is not chosen
    assert plans.choose(LORA_FORWARD, LARGE, torch.bfloat16, little).tile.stages == 3


def test_interpreter_and_cpu_get_the_default() -> None:
    assert targets.detect(torch.device("cpu")) is targets.DEFAULT


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_120"), ((7, 5), "default")],
)
def test_detect_architecture(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor = capability
        name = "a card"
        multi_processor_count = 17
        shared_memory_per_block_optin = 99_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    target = targets.detect.__wrapped__(torch.device("cuda"))
    assert (target.name, target.multiprocessors) == (name, 17)
    if name == "default":
        assert target.shared_bytes == 99_000


@pytest.mark.parametrize(
    ("name", "capability", "count", "card"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "H100"),
        ("NVIDIA H100 NVL", (9, 0), 132, "H100 NVL"),
        ("NVIDIA H100 PCIe", (9, 0), 114, "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "A100"),
        ("NVIDIA A30", (8, 0), 56, "A100"),
        ("NVIDIA L40S", (8, 9), 142, "L40S"),
        ("NVIDIA L40", (8, 9), 142, "RTX 4090"),
        ("NVIDIA B300 SXM6 AC", (10, 3), 148, "B300"),
        ("NVIDIA GB300", (10, 3), 152, "B300"),
        ("NVIDIA GeForce RTX 5080", (12, 0), 84, "RTX 5090"),
        ("NVIDIA GB10", (12, 1), 48, "GB10"),
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, "RTX 3090"),
    ],
)
def test_detect_card(
    name: str, capability: tuple[int, int], count: int, card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        major, minor = capability
        multi_processor_count = count

    Properties.name = name  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    target = targets.detect.__wrapped__(torch.device("cuda"))
    known = targets.CARDS[card]
    assert (target.card, target.multiprocessors) == (card, count)
    assert target.tensor_tflops / count == pytest.approx(known.tensor_tflops / known.multiprocessors)
