"""The launch plan: deterministic, fits every target, never an error on an unknown GPU."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="plans are for the kernels")

from fastlora_kernels import plan as plans
from fastlora_kernels import targets
from fastlora_kernels.plan import Shape

LARGE = Shape(m=8192, n=4096, k=4096, r=16)
SHAPES = [LARGE, Shape(m=1, n=1, k=1, r=1), Shape(m=100, n=768, k=3072, r=256), Shape(m=0, n=0, k=0, r=1)]
UNKNOWN = targets.replace(targets.DEFAULT, name="sm_999", multiprocessors=7, shared_bytes=49_152)


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


def test_pinned_choices() -> None:
    """Changing a pinned tile is a decision, not a side effect."""
    forward = plans.choose("lora_forward", LARGE, torch.bfloat16, targets.TARGETS["sm_90"])
    assert forward == plans.Plan("split", plans.Tile(128, 256, 64, 16, warps=8, stages=4))
    small = plans.choose("lora_forward", Shape(64, 512, 512, 16), torch.bfloat16, targets.TARGETS["sm_90"])
    assert (small.tile.rows, small.tile.cols) == (64, 64)
    down = plans.choose("lora_down", Shape(256, 4096, 4096, 16), torch.bfloat16, targets.TARGETS["sm_90"])
    assert down.splits > 1


@pytest.mark.parametrize(
    ("shape", "dtype", "path"),
    [
        (LARGE, torch.bfloat16, "split"),
        (LARGE, torch.float32, "library"),
        (Shape(8, 4096, 4096, 16), torch.bfloat16, "library"),
        (Shape(8192, 4095, 4096, 16, aligned=False), torch.bfloat16, "library"),
        (Shape(8192, 4096, 4096, 100), torch.bfloat16, "library"),
    ],
    ids=["large", "fp32", "few rows", "unaligned", "odd rank"],
)
def test_path(shape: Shape, dtype: torch.dtype, path: str) -> None:
    assert plans.choose("lora_forward", shape, dtype, targets.TARGETS["sm_90"]).path == path
    assert plans.choose("lora_forward", shape, dtype, UNKNOWN).path == "library"


def test_shared_memory_limits_the_pipeline() -> None:
    little = replace(targets.TARGETS["sm_90"], name="sm_998", shared_bytes=101_376)
    plan = plans.choose("lora_forward", LARGE, torch.bfloat16, little)
    assert plan.tile.stages == 2


def test_interpreter_and_cpu_get_the_default() -> None:
    assert targets.detect(torch.device("cpu")) is targets.DEFAULT


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "default")]
)
def test_detect(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
