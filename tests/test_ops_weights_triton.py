"""Quantised weights by the kernels, in the interpreter or on a GPU: values, and whole calls of LoRA's op."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

import fastlora
from fastlora.ops import kernel_paths, lora_triton
from fastlora.ops.decide import WITHOUT_PATHS, Decision, Paths
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_linear import LoRALinearFunction, lora_linear
from fastlora.ops.weights import decode_triton, dense_triton
from fastlora.ops.weights import four_bit as four_bit_module
from fastlora.ops.weights.four_bit import FourBitWeight
from fastlora.ops.weights.frozen import FrozenWeight, is_made_dense_by_kernels
from fastlora.ops.weights.scaled import ScaledWeight
from fastlora_kernels.choose import quantised
from fastlora_kernels.choose.lora import Path
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.lora.epilogue import lora_add
from fastlora_kernels.quant import kernels
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
from tests.quantised import DTYPES, assert_rows_are, four_bit, read


def eight_bit(
    device: torch.device, codes: torch.dtype, factors: tuple[int, int], block: tuple[int, int], **more: Any
) -> ScaledWeight:
    generator = torch.Generator().manual_seed(2)
    stored = torch.randn(132, 300, generator=generator).mul_(30).to(codes)
    scales = torch.rand(factors, generator=generator)
    return ScaledWeight(stored.to(device), scales.to(device), block, **more)


EIGHT_BIT: dict[str, Callable[[torch.device], ScaledWeight]] = {
    "LLM.int8": lambda device: eight_bit(device, torch.int8, (132, 1), (1, 300), unit=1 / 127),
    "int8": lambda device: eight_bit(device, torch.int8, (1, 1), (132, 300)),
    "FP8 in blocks": lambda device: eight_bit(
        device, torch.float8_e4m3fn, (2, 3), (128, 128), product=torch.float32
    ),
}


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
    seen: list[tuple[int, ...]] = []
    fill = dense_triton._dequantise_4bit

    def watched(*tensors: Tensor, **settings: int) -> None:
        seen.append(tuple(tensors[-1].shape))
        fill(*tensors, **settings)

    monkeypatch.setattr(dense_triton, "_dequantise_4bit", watched)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("k", [64, 33])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_values_of_eight_bits_are_the_same_bits(
    kind: str, dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's own products on a CPU."""
    expected = EIGHT_BIT[kind](torch.device("cpu")).dense(dtype)
    weight = EIGHT_BIT[kind](kernel_device)
    launches: list[torch.Size] = []
    fill = dense_triton._dequantise_8bit

    def watched(*tensors: Tensor, **settings: Any) -> None:
        launches.append(tensors[-1].shape)
        fill(*tensors, **settings)

    monkeypatch.setattr(dense_triton, "_dequantise_8bit", watched)
    with fastlora.use_backend("triton"):
        for rows in (slice(None), slice(128, 132), slice(0, 128)):
            assert torch.equal(weight.dense(dtype, rows).cpu(), expected[rows])
    assert launches == [(132, 300), (4, 300), (128, 300)]


@pytest.mark.parametrize("path", ["split", "epilogue"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("parts", cases([1, 8], [3, 12]))
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


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of y that the kernel which decodes has filled, where all calls are told that it is fastest."""
    seen: list[tuple[int, ...]] = []
    fills: dict[str, Any] = {name: getattr(decode_triton, name) for name in ("_four_bits", "_eight_bits")}

    def watch(name: str) -> Callable[..., Any]:
        def watched(*tensors: Tensor, **settings: Any) -> Any:
            seen.append(tuple(tensors[-1].shape))
            return fills[name](*tensors, **settings)

        return watched

    for name in fills:
        monkeypatch.setattr(decode_triton, name, watch(name))
    # what this path refuses, a prediction does, too
    monkeypatch.setattr(
        quantised, "decodes", lambda *call, dropping: not dropping or call[-1] in ("int8", "fp8-rows")
    )
    return seen


@pytest.mark.parametrize(("quant_type", "blocksize", "nested"), [
    ("nf4", 64, True), ("nf4", 128, False), ("fp4", 64, True),
])  # fmt: skip
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
    filled: list[tuple[int, ...]] = []
    dense = dense_triton._dequantise_8bit

    def watched(*tensors: Tensor, **settings: Any) -> None:
        filled.append(tuple(tensors[-1].shape))
        dense(*tensors, **settings)

    monkeypatch.setattr(dense_triton, "_dequantise_8bit", watched)
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
        call(eight_bit(kernel_device, torch.int8, (132, 1), (1, 300)))
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
