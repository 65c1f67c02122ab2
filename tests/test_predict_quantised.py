"""What calls over quantised weights are predicted to cost."""

from typing import Any

import pytest
import torch

from fastlora_kernels.choose.explain import Explanation, explain
from fastlora_kernels.choose.quantised import Stored, stored_bytes
from fastlora_kernels.predict.launches import Launch
from fastlora_kernels.targets import CARDS, DEFAULT, Target
from fastlora_kernels.tile import Shape

H100 = CARDS["H100"]
LAYER = Shape(8192, 4096, 4096, 16)
STORED: tuple[Stored, ...] = ("nf4", "int8", "fp8")
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
    assert stored_bytes("fp8", 4000, 4100) == 4000 * 4100 + 4 * 32 * 33
    assert stored_bytes("nf4", 1, 3) == 2 + 1 + 4 + 1024 + 4 + 64


@pytest.mark.parametrize("k", [64, 33])
def test_stored_bytes_are_those_of_bitsandbytes(k: int) -> None:
    pytest.importorskip("bitsandbytes", reason="compares with it")
    from tests.quantised import four_bit, read

    # the table of 16 is shared by all
    stored = sum(tensor.numel() * tensor.element_size() for tensor in read(four_bit(35, k)).tensors)
    assert stored_bytes("nf4", 35, k) == stored + 64


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
        ("lora_linear", "nf5", "expected a weight out of nf4, int8, fp8, got 'nf5'"),
        ("dora_linear", "nf4", "expected the op lora_linear beside weight nf4, got 'dora_linear'"),
    ],
)
def test_bad_input(op: Any, weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(op, LAYER, torch.bfloat16, H100, weight=weight)
