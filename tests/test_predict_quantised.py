"""What calls over quantised weights are predicted to cost."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose.explain import Explanation, explain
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.quantised import Stored, decodes, stored_bytes
from fastlora_kernels.predict.launches import Launch
from fastlora_kernels.quant.kernels import DECODE, LORA_FORWARD_8BIT
from fastlora_kernels.targets import CARDS, DEFAULT, Target
from fastlora_kernels.tile import Shape

H100 = CARDS["H100"]
LAYER = Shape(8192, 4096, 4096, 16)
STORED: tuple[Stored, ...] = ("nf4", "int8", "fp8", "fp8-rows")
DENSE_BYTES = 4096 * 4096 * 2


def predicted(weight: Stored | None, shape: Shape = LAYER, **options: Any) -> Explanation:
    return explain("lora_linear", shape, torch.bfloat16, H100, dropout=0.1, weight=weight, **options)


def dequantised(launches: list[Launch]) -> list[Launch]:
    return [launch for launch in launches if launch.name.startswith("dequantise")]


@pytest.mark.parametrize("weight", STORED)
def test_over_the_frozen_dense_layer(weight: Stored) -> None:
    """At most 1.15, the dense layer's call and one launch more in each pass."""
    found, dense = predicted(weight), predicted(None)
    assert found.ceiling_us == dense.ceiling_us
    assert found.overhead <= 1.15
    assert found.path == dense.path
    for mine, others in ((found.forward, dense.forward), (found.backward, dense.backward)):
        (first,) = dequantised(mine.launches)
        assert mine.launches == [first, *others.launches]
        # nothing is moved twice
        assert first.bytes == stored_bytes(weight, 4096, 4096) + DENSE_BYTES
        assert first.bound == "memory"


@pytest.mark.parametrize(("side", "overhead"), [(4096, 1.14), (5120, 1.12), (8192, 1.17)])
def test_what_the_readme_says(side: int, overhead: float) -> None:
    assert predicted("nf4", Shape(8192, side, side, 16)).overhead == pytest.approx(overhead, abs=0.005)


def test_stored_bytes() -> None:
    elements = 4096 * 4096
    assert stored_bytes("nf4", 4096, 4096) == elements / 2 + elements / 64 * (1 + 4 / 256) + 1024 + 4 + 64
    assert stored_bytes("int8", 4096, 4096) == elements + 4 * 4096
    assert stored_bytes("fp8-rows", 4096, 4096) == elements + 4 * 4096
    assert stored_bytes("fp8", 4000, 4100) == 4000 * 4100 + 4 * 32 * 33
    assert stored_bytes("nf4", 1, 3) == 2 + 1 + 4 + 1024 + 4 + 64


@pytest.mark.parametrize("k", [64, 33])
def test_stored_bytes_are_those_of_bitsandbytes(k: int) -> None:
    pytest.importorskip("bitsandbytes", reason="compares with it")
    from tests.quantised import four_bit, read

    # the table of 16 is shared by all
    stored = sum(tensor.numel() * tensor.element_size() for tensor in read(four_bit(35, k)).tensors)
    assert stored_bytes("nf4", 35, k) == stored + 64


@pytest.mark.parametrize(
    ("card", "rows", "decoded"),
    [
        ("H100", 1, True), ("H100", 16, True), ("H100", 64, False), ("RTX 4090", 128, True),
        ("RTX 4090", 256, True), ("MI300X", 4, True),
    ],
)  # fmt: skip
def test_few_rows_are_multiplied_by_what_is_decoded_on_the_way(card: str, rows: int, decoded: bool) -> None:
    """Forward, in one launch; backward makes the weight dense."""
    shape, target = replace(LAYER, m=rows), CARDS[card]
    found = explain("lora_linear", shape, torch.bfloat16, target, weight="nf4")
    path = found.forward.path
    assert decodes(shape, torch.bfloat16, target, "nf4", dropping=False) == (path == DECODE) == decoded
    assert len(dequantised(found.backward.launches)) == 1
    (mine,) = (
        each
        for each in [found.forward, *found.rejected["forward"]]
        if each.path == DECODE and not each.refused
    )
    (launch,) = mine.launches
    assert launch.name == "lora_forward_4bit"
    # x may be read more than once; the weight is, as it is stored
    x, y = 2 * rows * 4096, 2 * rows * 4096
    assert stored_bytes("nf4", 4096, 4096) + x + y <= launch.bytes < DENSE_BYTES / 2


@pytest.mark.parametrize("weight", ["int8", "fp8-rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("card", "rows", "decoded"),
    [
        # the guide says so
        ("H100", 1, None), ("H100", 16, None), ("H100", 128, None), ("H100", 256, False), ("A100", 16, True),
        ("A100", 64, False), ("RTX 4090", 256, True), ("RTX 4090", 384, False), ("MI300X", 16, None),
        ("MI300X", 512, False),
    ],
)  # fmt: skip
def test_bytes_are_decoded_while_that_takes_less_than_a_dense_copy(
    card: str, rows: int, decoded: bool | None, dropout: float, weight: Stored
) -> None:
    """None: with dropout alone, where a dense copy takes a launch more; without, the host takes as long."""
    shape, target, decoded = replace(LAYER, m=rows), CARDS[card], dropout > 0 if decoded is None else decoded
    found = explain("lora_linear", shape, torch.bfloat16, target, dropout=dropout, weight=weight)
    path = found.forward.path
    assert decodes(shape, torch.bfloat16, target, weight, dropping=dropout > 0) == (path == DECODE) == decoded
    (mine,) = (each for each in [found.forward, *found.rejected["forward"]] if each.path == DECODE)
    *before, product = mine.launches
    assert (before[0].name, product.name) == ("lora_down", "lora_forward_8bit")
    assert stored_bytes(weight, 4096, 4096) < product.bytes
    if decoded:
        assert found.tile == plans.choose(LORA_FORWARD_8BIT, shape, torch.bfloat16, target).tile


@pytest.mark.parametrize(
    ("weight", "dtype", "why"),
    [
        ("fp8", torch.bfloat16, "scales of 128 × 128 values multiply no whole sums"),
        ("int8", torch.float32, "float32 products in IEEE precision have no matrix units"),
    ],
)
def test_why_bytes_are_not_decoded(weight: Stored, dtype: torch.dtype, why: str) -> None:
    found = explain("lora_linear", replace(LAYER, m=16), dtype, H100, weight=weight)
    reasons = [
        each.refused for part in get_args(Pass) for each in found.rejected[part] if each.path == DECODE
    ]
    assert reasons[0] == why
    assert reasons[1]


@pytest.mark.parametrize(
    ("shape", "dropout", "why"),
    [
        (Shape(65, 4096, 4096, 16), 0.0, "above 64 rows it decodes the weight too often"),
        (Shape(16, 4096, 4096, 16), 0.1, "dropout inside the main loop would stall it"),
        (Shape(16, 4096, 4080, 16), 0.0, "rows that are no multiple of 64 long end within a block"),
        (Shape(16, 4096, 4096, 80), 0.0, "its registers hold ranks up to 64"),
        (Shape(16, 4090, 4096, 16, aligned=False), 0.0, "rows that are no multiple of 16 long"),
    ],
    ids=str,
)  # fmt: skip
def test_why_a_call_does_not_decode(shape: Shape, dropout: float, why: str) -> None:
    found = explain("lora_linear", shape, torch.bfloat16, H100, dropout=dropout, weight="nf4")
    for part in get_args(Pass):
        (mine,) = (each for each in found.rejected[part] if each.path == DECODE)
        assert mine.refused
        assert part == "backward" or why in mine.refused
    assert not decodes(shape, torch.bfloat16, H100, "nf4", dropping=dropout > 0)


def test_no_rows_are_not_decoded() -> None:
    for weight in STORED:
        assert not decodes(replace(LAYER, m=0), torch.bfloat16, H100, weight, dropping=False)


def test_a_weight_beyond_the_workspace_comes_in_parts() -> None:
    wide = Shape(8192, 14336, 4096, 16)
    found = predicted("nf4", wide)
    for part in (found.forward, found.backward):
        assert len(dequantised(part.launches)) == 2
    moved = sum(launch.bytes for launch in dequantised(found.launches))
    assert moved == pytest.approx(2 * (stored_bytes("nf4", 14336, 4096) + 14336 * 4096 * 2), rel=1e-3)
    names = [launch.name for launch in found.forward.launches]
    assert (names.count("lora_down"), names.count("lora_forward")) == (1, 2)
    assert found.backward.launches[-1].name == "parts of dX"
    # a copy of y, or of dX in float32, would cost a tenth
    assert found.overhead <= 1.2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [Shape(8192, 28672, 8192, 16), Shape(7, 33, 50, 3, aligned=False)], ids=str)
@pytest.mark.parametrize("target", [*CARDS.values(), DEFAULT], ids=lambda target: target.card)
def test_every_call_gets_a_path(target: Target, shape: Shape, dtype: torch.dtype, dropout: float) -> None:
    found = explain("lora_linear", shape, dtype, target, dropout=dropout, weight="nf4")
    assert not found.forward.refused
    assert len(dequantised(found.forward.launches)) == len(dequantised(found.backward.launches)) >= 1


@pytest.mark.parametrize(
    ("op", "weight", "message"),
    [
        ("lora_linear", "nf5", "expected a weight out of nf4, int8, fp8, fp8-rows, got 'nf5'"),
        ("dora_linear", "nf4", "expected the op lora_linear beside weight nf4, got 'dora_linear'"),
    ],
)
def test_bad_input(op: Any, weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(op, LAYER, torch.bfloat16, H100, weight=weight)
