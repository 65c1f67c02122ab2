"""LoRA's op over quantised weights that kernels decode in the forward product's loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

import fastlora
from fastlora.ops.decide import Decision, Paths
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_linear import LoRALinearFunction, lora_linear
from fastlora.ops.weights import decode_triton, dense_triton
from fastlora.ops.weights.four_bit import FourBitWeight
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.scaled import ScaledWeight
from fastlora_kernels.choose import quantised
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.tile import Shape
from tests.cases import cases
from tests.exactness import assert_as_exact
from tests.lora_yardstick import (
    NAMES,
    assert_as_exact_as_eager,
    eager,
    make_case,
    outputs_and_gradients,
    unpack_mask,
)
from tests.quantised import four_bit, read, shapes_filled


def _bytes(device: torch.device, codes: torch.dtype, rows: int, k: int = 112, **more: Any) -> ScaledWeight:
    stored, scales = (torch.randn(48, k) * 30).to(codes), torch.rand(rows, 1) / 30
    return ScaledWeight(stored.to(device), scales.to(device), (1 if rows > 1 else 48, k), **more)


DECODED: dict[str, Callable[[torch.device], ScaledWeight]] = {
    "LLM.int8": lambda device: _bytes(device, torch.int8, 48, unit=1 / 127),
    "int8, one scale": lambda device: _bytes(device, torch.int8, 1),
    "FP8": lambda device: _bytes(device, torch.float8_e4m3fn, 48, product=torch.float32),
    "FP8, one scale": lambda device: _bytes(device, torch.float8_e4m3fn, 1, product=torch.float32),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the kernel has filled."""
    return shapes_filled(monkeypatch, dense_triton, "_dequantise_4bit")


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of y that the kernel which decodes has filled, where all calls are told that it is fastest."""
    # what this path refuses, a prediction does, too
    monkeypatch.setattr(
        quantised, "decodes", lambda *call, dropping: not dropping or call[-1] in ("int8", "fp8-rows")
    )
    return shapes_filled(monkeypatch, decode_triton, "_four_bits", "_eight_bits")


@pytest.mark.parametrize(
    ("quant_type", "blocksize", "nested"),
    cases([("nf4", 64, True)], [("nf4", 128, False), ("fp4", 64, True)]),
)
def test_a_call_that_decodes_errs_no_more_than_eager(
    quant_type: str, blocksize: int, nested: bool, dtype: torch.dtype, kernel_device: torch.device,
    decoding: list[tuple[int, ...]], launches: list[tuple[int, ...]],
) -> None:  # fmt: skip
    """Nothing is dense forward; backward makes the weight dense as ever."""
    n, k = 48, 256
    weight = read(four_bit(n, k, quant_type, blocksize, nested=nested).to(kernel_device))
    case = make_case(33, n, k, 8, dtype, device=kernel_device)

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = lora_linear(x, weight, case.bias, a, b, scaling=case.scaling)
        assert launches == []
        return y

    with fastlora.use_backend("triton"):
        got = outputs_and_gradients(forward, case)
        assert (decoding, launches) == ([(33, n)], [(n, k)])
        case.weight = weight.dense(dtype)
    assert_as_exact_as_eager(got, case)


@pytest.mark.parametrize(
    ("kind", "dropout"),
    cases([("LLM.int8", 0.3), ("FP8, one scale", 0.0)], [("int8, one scale", 0.0), ("FP8", 0.3)]),
)
def test_a_call_over_bytes_that_decodes_errs_no_more_than_eager(
    kind: str, dropout: float, dtype: torch.dtype, kernel_device: torch.device,
    decoding: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Against float64 sums of the weight as it is stored, which eager rounds; backward makes it dense."""
    weight, (n, k) = DECODED[kind](kernel_device), (48, 112)
    filled = shapes_filled(monkeypatch, dense_triton, "_dequantise_8bit")
    case = make_case(33, n, k, 8, dtype, device=kernel_device)
    seed = torch.tensor([5], device=kernel_device) if dropout else None
    paths = Paths(Shape(33, n, k, 8), Choice("decode"), Choice("split"))

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        settings = (case.scaling, dropout, Decision("triton", paths))
        y: Tensor
        y, _, mask = LoRALinearFunction.apply(x, weight, case.bias, a, b, seed, *settings)
        case.keep = None if mask is None else unpack_mask(mask, k)
        assert filled == []
        return y

    with fastlora.use_backend("triton"):
        got = outputs_and_gradients(forward, case)
    assert (decoding, filled) == ([(33, n)], [(n, k)])
    case.keep_probability = keep_probability(dropout)
    assert (case.keep is not None) == (dropout > 0)
    codes, factors = weight.stored.to(dtype), weight.factors.mul(weight.unit)

    def compute(tensors: list[Tensor]) -> list[Tensor]:
        *others, codes, factors = tensors
        rounded = (codes * factors).to(codes.dtype)
        return eager(case.holding([others[0], rounded, *others[1:]]))

    x, _, *others = case.tensors
    assert_as_exact(NAMES, got, compute, [x, *others, codes, factors])


def test_a_call_over_bytes_is_told_to_decode(
    kernel_device: torch.device, decoding: list[tuple[int, ...]]
) -> None:
    """With dropout, too; not where blocks have scales, nor where a zero is not code 0, nor in odd rows."""

    def call(weight: ScaledWeight, dropout: float = 0.0) -> Tensor:
        n, k = weight.shape
        x = torch.randn(3, k, device=kernel_device)
        a, b = torch.ones(2, k, device=x.device), torch.ones(n, 2, device=x.device)
        return lora_linear(x, weight, None, a, b, scaling=1.0, dropout=dropout)

    made = _bytes(kernel_device, torch.int8, 48, 272)
    codes, factors, (n, k) = made.stored, made.factors, made.shape
    shifted = ScaledWeight(codes, factors, (1, k), zero_point=torch.ones_like(factors, dtype=torch.int8))
    others = (
        shifted,
        # rounded by its library
        ScaledWeight(codes, factors, (1, k), product=torch.bfloat16),
        ScaledWeight(codes.to(torch.float8_e5m2), factors, (1, k)),
        ScaledWeight(codes, factors.expand(n, 3).contiguous(), (1, 128)),
        ScaledWeight(codes.to(torch.float8_e4m3fn), factors[:1].expand(1, 3).contiguous(), (128, 128)),
    )
    with fastlora.use_backend("triton"):
        for each in others:
            assert each.scale is None
            call(each)
        call(_bytes(kernel_device, torch.int8, 48, 300))
        assert decoding == []
        call(made, dropout=0.5)
        call(ScaledWeight(codes, factors.bfloat16(), (1, k)))
    assert decoding == [(3, n)] * 2


@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (0,)], ids=str)
def test_a_call_that_decodes_takes_any_rows(
    rows: tuple[int, ...], kernel_device: torch.device, decoding: list[tuple[int, ...]]
) -> None:
    weight = read(four_bit(16, 64).to(kernel_device))
    x = torch.randn(*rows, 64, device=kernel_device)
    a, b = torch.randn(2, 64, device=kernel_device), torch.randn(16, 2, device=kernel_device)
    with fastlora.use_backend("triton"):
        y = lora_linear(x, weight, None, a, b, scaling=1.0)
        dense = lora_linear(x, weight.dense(x.dtype), None, a, b, scaling=1.0)
    assert decoding == [(x.shape[:-1].numel(), 16)]
    torch.testing.assert_close(y, dense)


def test_what_can_not_be_decoded_becomes_dense(
    kernel_device: torch.device, decoding: list[tuple[int, ...]], launches: list[tuple[int, ...]]
) -> None:
    """Blocks over the ends of rows, shorter ones, other groups; rows that lie askew; dropout; a trace."""

    def call(weight: FrozenWeight, x: Tensor, dropout: float = 0.0) -> Tensor:
        n, k = weight.shape
        a, b = torch.ones(2, k, device=x.device), torch.ones(n, 2, device=x.device)
        return lora_linear(x, weight, None, a, b, scaling=1.0, dropout=dropout)

    def rows(k: int) -> Tensor:
        return torch.randn(3, k, device=kernel_device)

    weight = read(four_bit(16, 64).to(kernel_device))
    other = read(four_bit(16, 64).to(kernel_device))
    assert isinstance(other, FourBitWeight)
    assert other.nested is not None
    with fastlora.use_backend("triton"):
        call(read(four_bit(16, 96).to(kernel_device)), rows(96))
        call(read(four_bit(16, 64, blocksize=32).to(kernel_device)), rows(64))
        call(weight, rows(65)[:, 1:])
        call(weight, rows(64), dropout=0.5)
        make_fx(lambda x: call(weight, x))(rows(64))
        assert len(launches) == 5
        other.nested = other.nested._replace(blocksize=128)
        call(other, rows(64))
    assert decoding == []
