"""Quantised weights by the kernels, in the interpreter or on a GPU: values, and whole calls of LoRA's op."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

import fastlora
from fastlora.ops import kernel_paths, lora_triton
from fastlora.ops.decide import WITHOUT_PATHS
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_linear import LoRALinearFunction, lora_linear
from fastlora.ops.weights import dense_triton
from fastlora.ops.weights import four_bit as four_bit_module
from fastlora.ops.weights.four_bit import FourBitWeight
from fastlora.ops.weights.frozen import is_made_dense_by_kernels
from fastlora.ops.weights.scaled import ScaledWeight
from fastlora_kernels.choose.lora import Path
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.lora.epilogue import lora_add
from fastlora_kernels.quant import kernels
from tests.cases import cases
from tests.lora_yardstick import (
    assert_as_exact_as_eager,
    make_case,
    outputs_and_gradients,
    unpack_mask,
)
from tests.quantised import DTYPES, assert_rows_are, four_bit, read, shapes_filled


def eight_bit(
    device: torch.device, codes: torch.dtype, factors: tuple[int, int], block: tuple[int, int], **more: Any
) -> ScaledWeight:
    generator = torch.Generator().manual_seed(2)
    stored = torch.randn(132, 300, generator=generator).mul_(30).to(codes)
    scales = torch.rand(factors, generator=generator)
    return ScaledWeight(stored.to(device), scales.to(device), block, **more)


# a size of which blocks make whole rows and one of which they don't, and how the weight is stored
STORED = [(64, "nf4", True), (33, "fp4", False)]
# how many parts the workspace asks for, nested statistics, dropout, path
CALLS: list[tuple[int, bool, float, Path]] = [
    (1, False, 0.0, "split"), (8, True, 0.3, "split"),
    (1, True, 0.3, "epilogue"), (8, False, 0.0, "epilogue"),
]  # fmt: skip
PATHS: tuple[Path, ...] = ("split", "epilogue")
EIGHT_BIT: dict[str, Callable[[torch.device], ScaledWeight]] = {
    "LLM.int8": lambda device: eight_bit(device, torch.int8, (132, 1), (1, 300), unit=1 / 127),
    "int8": lambda device: eight_bit(device, torch.int8, (1, 1), (132, 300)),
    "FP8 in blocks": lambda device: eight_bit(
        device, torch.float8_e4m3fn, (2, 3), (128, 128), product=torch.float32
    ),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the kernel has filled."""
    return shapes_filled(monkeypatch, dense_triton, "_dequantise_4bit")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("k", "quant_type", "nested"),
    cases(STORED, [each for each in product((64, 33), ("nf4", "fp4"), (True, False)) if each not in STORED]),
)
def test_values_are_bitsandbytes_own(
    k: int, quant_type: str, nested: bool, dtype: torch.dtype,
    kernel_device: torch.device, launches: list[tuple[int, ...]],
) -> None:  # fmt: skip
    """All rows at once and each part alone."""
    layer = four_bit(35, k, quant_type, nested=nested)
    # on a CPU by bitsandbytes' own op
    theirs = read(layer).dense(dtype).to(kernel_device)
    assert launches == []
    weight = read(layer.to(kernel_device))
    with fastlora.use_backend("triton"):
        assert_rows_are(weight, lambda dtype: theirs, dtype)
    assert (35, k) in launches


@pytest.mark.parametrize("dtype", cases(DTYPES[-1:], DTYPES[:-1]), ids=str)
@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_values_of_eight_bits_are_the_same_bits(
    kind: str, dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's own products on a CPU."""
    expected = EIGHT_BIT[kind](torch.device("cpu")).dense(dtype)
    weight = EIGHT_BIT[kind](kernel_device)
    launches = shapes_filled(monkeypatch, dense_triton, "_dequantise_8bit")
    with fastlora.use_backend("triton"):
        for rows in (slice(None), slice(128, 132), slice(0, 128)):
            assert torch.equal(weight.dense(dtype, rows).cpu(), expected[rows])
    assert launches == [(132, 300), (4, 300), (128, 300)]


@pytest.mark.parametrize(
    ("parts", "nested", "dropout", "path"),
    cases(
        CALLS,
        [call for call in product((1, 3, 8, 12), (True, False), (0.0, 0.3), PATHS) if call not in CALLS],
    ),
)
def test_a_call_errs_no_more_than_eager(
    parts: int, nested: bool, dropout: float, path: Path, dtype: torch.dtype, kernel_device: torch.device,
    launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Forward and backward make the weight dense anew, in as many parts as the workspace asks for."""
    n, k = 48, 96
    monkeypatch.setattr(kernel_paths, "choose", lambda *call, **settings: Choice(path))
    added: list[tuple[int, ...]] = []
    add: Any = lora_add

    def watched(*tensors: Any, **settings: Any) -> Any:
        added.append(tuple(tensors[-1].shape))
        return add(*tensors, **settings)

    monkeypatch.setattr(lora_triton, "lora_add", watched)
    weight = read(four_bit(n, k, nested=nested).to(kernel_device))
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", n // parts * k * dtype.itemsize)
    case = make_case(33, n, k, 8, dtype, device=kernel_device)
    seed = torch.tensor([5], device=kernel_device) if dropout else None

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        settings = (case.scaling, dropout, WITHOUT_PATHS["triton"])
        y: Tensor
        y, _, mask = LoRALinearFunction.apply(x, weight, case.bias, a, b, seed, *settings)
        case.keep = None if mask is None else unpack_mask(mask, k)
        assert set(added) == ({(33, n // parts)} if path == "epilogue" else set())
        return y

    with fastlora.use_backend("triton"):
        got = outputs_and_gradients(forward, case)
        assert launches == [(n // parts, k)] * (2 * parts)
        case.weight = weight.dense(dtype)
    case.keep_probability = keep_probability(dropout)
    assert (case.keep is not None) == (dropout > 0)
    assert_as_exact_as_eager(got, case)


def test_without_the_kernels_the_library_makes_it_dense(
    kernel_device: torch.device, launches: list[tuple[int, ...]]
) -> None:
    """On a CPU unless the backend is asked for; in float64; with groups of another size than the kernel's."""
    weight = read(four_bit(8, 64))
    weight.dense(torch.float32)
    with fastlora.use_backend("triton"):
        weight.dense(torch.float64)
        assert isinstance(weight, FourBitWeight)
        assert weight.nested is not None
        weight.nested = weight.nested._replace(blocksize=128)
        weight.dense(torch.float32)
        assert is_made_dense_by_kernels(kernel_device, torch.float32, kernels.MOST_ELEMENTS)
        assert not is_made_dense_by_kernels(kernel_device, torch.float32, kernels.MOST_ELEMENTS + 1)
    assert launches == []


def test_a_fake_trace_leaves_nothing_behind(kernel_device: torch.device) -> None:
    """The table of 16 is kept, and made anew where the weight itself is fake."""
    layer = four_bit(16, 64)
    expected = read(layer).dense(torch.float32).to(kernel_device)
    weight = read(layer.to(kernel_device))
    assert isinstance(weight, FourBitWeight)
    four_bit_module._table.cache_clear()
    with fastlora.use_backend("triton"):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.inference_mode():
            fake = weight.rebuilt([mode.from_tensor(each) for each in weight.tensors], *weight.recipe())
            for each in (weight, fake):
                assert isinstance(each.dense(torch.float32), FakeTensor)
        assert not weight.table.is_inference()
        assert torch.equal(weight.dense(torch.float32), expected)


def test_what_traces_a_call_sees_an_operator(kernel_device: torch.device) -> None:
    weight = read(four_bit(16, 64).to(kernel_device))

    def call(x: Tensor) -> Tensor:
        a, b = torch.ones(2, 64, device=x.device), torch.ones(16, 2, device=x.device)
        return lora_linear(x, weight, None, a, b, scaling=1.0)

    x = torch.randn(3, 64, device=kernel_device)
    with fastlora.use_backend("triton"):
        traced = make_fx(call)(x)
        other = torch.randn(3, 64, device=kernel_device)
        assert torch.equal(traced(other), call(other))
    assert "ops.fastlora.dense_four_bit" in traced.code
