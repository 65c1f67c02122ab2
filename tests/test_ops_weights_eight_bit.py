"""Weights of a byte a value: the same values as their library's own, bit for bit; others are refused."""

from typing import Any

import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitFp
from bitsandbytes.nn.modules import Linear8bitLt
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Linear

from fastlora.ops.weights.read import frozen_weight
from tests.quantised import (
    DTYPES,
    assert_as_exact_as_dense,
    assert_rows_are,
    assert_scale_is_apart,
    compressed,
    llm_int8,
    read,
)


def fp8(n: int, k: int, block: tuple[int, int] | None, scale_fmt: str = "float") -> Any:
    """transformers' layer with random bytes; no quantiser, so that every code occurs but NaN."""
    layer: Any = FP8Linear(k, n, block_size=block, scale_fmt=scale_fmt)
    layer.weight.data = torch.randn(n, k).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(layer.weight_scale_inv.shape).add_(0.1).mul_(0.01)
    layer.weight_scale_inv.data = scale.to(layer.weight_scale_inv.dtype)
    return layer


@pytest.mark.parametrize("called", [False, True], ids=["new", "after a call"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_llm_int8_values_are_those_of_its_matmul(dtype: torch.dtype, called: bool) -> None:
    layer = llm_int8(19, 40)
    weight = read(layer)
    if called:
        layer(torch.randn(2, 40))
        weight = read(layer)
    else:
        layer.init_8bit_state()

    def theirs(dtype: torch.dtype) -> Tensor:
        # what it multiplies the unit matrix by
        unit = torch.eye(40, dtype=dtype)
        product: Tensor = MatMul8bitFp.apply(unit, layer.weight, None, None, layer.state)
        return product.t()

    assert_rows_are(weight, theirs, dtype)
    assert_scale_is_apart(weight, True)


def test_llm_int8_factors_are_computed_once_for_each_layer() -> None:
    """Until they change, or are others; what traces a call computes them itself, and keeps nothing of it."""
    layer = llm_int8(19, 40)
    statistics = layer.weight.SCB
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(read(layer).scale, FakeTensor)
    first = read(layer).scale
    assert first is not None
    assert torch.equal(first, statistics * (1 / 127))
    again = read(layer).scale
    assert again is not None
    assert again.data_ptr() == first.data_ptr()
    statistics.mul_(2)
    changed = read(layer).scale
    assert changed is not None
    assert torch.equal(changed, statistics * (1 / 127))
    statistics.data = statistics / 4
    moved = read(layer)
    assert torch.equal(moved.dense(torch.float32), layer.weight.CB * (statistics * (1 / 127))[:, None])
    with torch.inference_mode():
        layer = llm_int8(19, 40)
        scale = layer.weight.SCB * (1 / 127)
        assert torch.equal(read(layer).dense(torch.float32), layer.weight.CB * scale[:, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "block"),
    [(12, 20, None), (256, 384, (128, 128)), (64, 96, (16, 32)), (6, 8, (1, 4)), (6, 8, (6, 8))],
    ids=str,
)
def test_fp8_values_are_those_of_a_dequantised_checkpoint(
    n: int, k: int, block: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    layer = fp8(n, k, block)

    def theirs(dtype: torch.dtype) -> Tensor:
        scales = layer.weight_scale_inv.detach()
        dequantise: Any = Fp8Dequantize
        values: Tensor = dequantise(None)._dequantize_one(
            layer.weight.detach(), scales.view(1, 1) if block is None else scales, output_dtype=dtype
        )
        return values

    weight = read(layer)
    assert_rows_are(weight, theirs, dtype)
    assert_scale_is_apart(weight, block in (None, (6, 8)))


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_with_ragged_blocks(scale_fmt: str) -> None:
    layer = fp8(200, 300, (128, 128), scale_fmt)
    scales = layer.weight_scale_inv.detach().float()
    of_each = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert_rows_are(
        read(layer), lambda dtype: (layer.weight.detach().float() * of_each).to(dtype), torch.bfloat16
    )


def test_every_code_of_fp8() -> None:
    layer = fp8(2, 128, None)
    layer.weight.data = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    layer.weight_scale_inv.data.fill_(1.0)
    weight = read(layer)
    for dtype in DTYPES:
        assert torch.equal(weight.dense(dtype).nan_to_num(), layer.weight.detach().to(dtype).nan_to_num())
        assert weight.dense(dtype).isnan().sum() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compressed_fp8_of_transformers(dtype: torch.dtype) -> None:
    layer: Any = CompressedTensorsFP8Linear(40, 12)
    layer.weight.data = torch.randn(12, 40).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    layer.weight_scale.data.uniform_(0.001, 0.01)
    own = (layer.weight.detach().float() * layer.weight_scale.detach().view(-1, 1)).to(dtype)
    weight = read(layer)
    assert_rows_are(weight, lambda dtype: own.to(dtype), dtype)
    assert_scale_is_apart(weight, True)
    assert weight.storage == "fp8-rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"strategy": "tensor"},
        {"strategy": "channel"},
        {"strategy": "group", "group_size": 16},
        {"strategy": "block", "block_structure": [8, 32]},
    ],
    ids=lambda arguments: arguments["strategy"],
)
def test_compressed_values_are_compressed_tensors_own(
    arguments: dict[str, Any], kind: str, of: torch.dtype, dtype: torch.dtype
) -> None:
    layer = compressed(20 if arguments["strategy"] != "block" else 24, 64, of, type=kind, **arguments)
    weights, scale = layer.quantization_scheme.weights, layer.weight_scale.detach()
    own = dequantize(layer.weight.detach(), scale, args=weights)
    assert own.dtype == of
    weight = read(layer)
    assert_rows_are(weight, lambda dtype: own.to(dtype), dtype)
    # a factor in 16 bits rounds the products
    assert_scale_is_apart(weight, arguments["strategy"] in ("tensor", "channel") and of == torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        llm_int8,
        lambda n, k: fp8(n, k, None),
        lambda n, k: fp8(n, k, (16, 16)),
        lambda n, k: compressed(n, k, type="int", strategy="channel"),
    ],
    ids=["LLM.int8", "FP8", "FP8 in blocks", "compressed-tensors"],
)
def test_gradients(make: Any, dtype: torch.dtype, dropout: float) -> None:
    assert_as_exact_as_dense(read(make(24, 96)), dtype, dropout)


def with_statistics(layer: Any, statistics: Tensor | None) -> Any:
    layer.weight.SCB = statistics
    return layer


def changed(layer: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        getattr(layer, name).data = value
    return layer


def with_attributes(layer: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: Linear8bitLt(8, 8), "Linear8bitLt that quantises its weight on every call"),
        (lambda: Linear8bitLt(8, 8, has_fp16_weights=False), "Linear8bitLt that is not quantised yet"),
        (lambda: with_statistics(llm_int8(8, 8), None), "Linear8bitLt that is not quantised yet"),
        (
            lambda: with_statistics(llm_int8(8, 8), torch.ones(7)),
            "Linear8bitLt with factors [7, 1] on cpu, not [8, 1] on cpu",
        ),
        (lambda: fp8(8, 8, None).to("meta"), "FP8Linear with a weight on the meta device"),
        (
            lambda: changed(fp8(8, 8, None), weight=torch.zeros(8, 8)),
            "FP8Linear with a weight in torch.float32",
        ),
        (
            lambda: changed(fp8(8, 8, None), weight=torch.zeros(8, 4).to(E4M3)),
            "FP8Linear with a weight of [8, 4]",
        ),
        (
            lambda: changed(fp8(8, 8, None), weight=torch.zeros(8, 8).to(E4M3).t()),
            "FP8Linear with a weight torch.float8_e4m3fn [8, 8] of strides (1, 8)",
        ),
        (
            lambda: changed(fp8(8, 8, (4, 4)), weight_scale_inv=torch.ones(2, 3)),
            "FP8Linear with factors [2, 3] on cpu, not [2, 2] on cpu",
        ),
        (
            lambda: changed(fp8(8, 8, None), weight_scale_inv=torch.ones(8, 1)),
            "FP8Linear without blocks with factors [8, 1]",
        ),
        (
            lambda: with_attributes(
                compressed(8, 8, type="int", strategy="tensor"), quantization_status="frozen"
            ),
            "layer of compressed-tensors that is frozen, not compressed",
        ),
        (
            lambda: compressed(8, 8, type="int", strategy="channel", symmetric=False),
            "layer of compressed-tensors with weight_zero_point",
        ),
        (lambda: nn.Linear(8, 8, device="meta"), "Linear with a weight of class Parameter"),
    ],
)
def test_what_is_not_understood(layer: Any, why: str) -> None:
    assert frozen_weight(layer()) == why
