"""torchao's quantised tensors: the same values as its own, bit for bit, and whatever else is refused."""

from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)

from fastlora.ops.weights.read import frozen_weight
from tests.quantised import (
    DTYPES,
    assert_as_exact_as_dense,
    assert_rows_are,
    assert_scale_is_apart,
    held,
    read,
    to_nf4,
)


def quantised(config: Any, dtype: torch.dtype, n: int = 24, k: int = 64) -> nn.Linear:
    layer = nn.Linear(k, n, dtype=dtype)
    quantize_(layer, config)
    return layer


EACH = {
    "int8 by rows": lambda w: Int8Tensor.from_hp(w, PerRow()),
    "int8": lambda w: Int8Tensor.from_hp(w, PerTensor()),
    "int8 by groups": lambda w: Int8Tensor.from_hp(w, PerGroup(16)),
    "int8 with a zero point": lambda w: Int8Tensor.from_hp(w + 1, PerRow(), MappingType.ASYMMETRIC),
    "float8 by rows": lambda w: Float8Tensor.from_hp(w, granularity=PerRow()),
    "float8": lambda w: Float8Tensor.from_hp(w, granularity=PerTensor()),
    "float8 of the other kind": lambda w: Float8Tensor.from_hp(w, torch.float8_e5m2),
    "float8 in blocks": lambda w: Float8Tensor(
        w.to(torch.float8_e4m3fn), torch.rand(6, 4) + 0.1, block_size=[4, 16], dtype=w.dtype
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", EACH)
def test_values_are_torchaos_own(kind: str, of: torch.dtype, dtype: torch.dtype) -> None:
    tensor = EACH[kind](torch.randn(24, 64, dtype=of))
    weight = read(held(tensor))
    assert_rows_are(weight, tensor.dequantize, dtype)
    # neither have kernels e5m2, nor zeros at other codes than 0
    others = ("groups", "blocks", "of the other kind", "zero point")
    assert_scale_is_apart(weight, not kind.endswith(others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "block", "scalers"), [(256, 64, 64, 256), (128, 96, 64, 16), (64, 32, 128, 4), (6, 8, 2, 8)]
)
def test_values_of_nf4(n: int, k: int, block: int, scalers: int, of: torch.dtype, dtype: torch.dtype) -> None:
    tensor: Any = to_nf4(torch.randn(n, k, dtype=of), block, scalers)
    assert_rows_are(read(held(tensor)), tensor.get_original_weight().to, dtype)


@pytest.mark.parametrize(
    "config",
    [
        Int8WeightOnlyConfig(version=2),
        Int8DynamicActivationInt8WeightConfig(version=2),
        Float8WeightOnlyConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(config: Any, dtype: torch.dtype, dropout: float) -> None:
    assert_as_exact_as_dense(read(quantised(config, dtype)), dtype, dropout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_over_nf4(dtype: torch.dtype) -> None:
    weight = read(held(to_nf4(torch.randn(24, 64, dtype=dtype), 64, 8)))
    assert_as_exact_as_dense(weight, dtype, 0.2)


def changed(tensor: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def nf4(**attributes: Any) -> Any:
    return changed(to_nf4(torch.randn(8, 64), 64, 8), **attributes)


def int8(**attributes: Any) -> Any:
    return changed(Int8Tensor.from_hp(torch.randn(8, 64), PerRow()), **attributes)


def on_meta() -> Any:
    codes = torch.empty(8, 64, dtype=torch.int8, device="meta")
    return Int8Tensor(codes, torch.empty(8, 1, device="meta"), [1, 64], torch.float32)


def float8(**attributes: Any) -> Any:
    return changed(Float8Tensor.from_hp(torch.randn(8, 64)), **attributes)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: int8(act_pre_scale=torch.ones(64)), "Int8Tensor for inputs that are scaled"),
        (lambda: int8(block_size=[1, 32]), "Int8Tensor with factors [8, 1] on cpu, not [8, 2] on cpu"),
        (lambda: int8(block_size=[]), "Int8Tensor of torch.int8 in blocks ()"),
        (
            lambda: int8(zero_point=torch.zeros(4, 1)),
            "Int8Tensor with factors [4, 1] on cpu, not [8, 1] on cpu",
        ),
        (on_meta, "Int8Tensor with a weight on the meta device"),
        (lambda: int8(scale=torch.ones(8, 1, dtype=torch.int32)), "Int8Tensor with factors in torch.int32"),
        (lambda: int8(scale=torch.ones(16, 1)[::2]), "Int8Tensor with factors of strides (2, 1)"),
        (lambda: float8(scale=torch.ones(3, 1)), "Float8Tensor [8, 64] with factors [3, 1]"),
        (lambda: float8(scale=torch.ones(8)), "Float8Tensor [8, 64] with factors [8]"),
        (lambda: float8(qdata=torch.zeros(8, 64, dtype=torch.uint8)), "with a weight torch.uint8 [8, 64]"),
        (lambda: nf4(nf4=torch.ones(15)), "NF4Tensor with table torch.float32 [15], not 16 of torch.float32"),
        (lambda: nf4(block_size=63), "NF4Tensor [8, 64] in blocks of 63"),
        (
            lambda: nf4(quantized_data=torch.zeros(256, dtype=torch.uint8, device="meta")),
            "on the meta device",
        ),
        (
            lambda: nf4(quantized_data=torch.zeros(255, dtype=torch.uint8)),
            "NF4Tensor with bytes torch.uint8 [255], not 256 of torch.uint8",
        ),
        (
            lambda: nf4(quantization_factor=torch.ones(2)),
            "NF4Tensor with factors torch.float32 [2], not 1 of torch.float32",
        ),
    ],
)
def test_what_is_not_understood(make: Any, why: str) -> None:
    told = frozen_weight(held(make()))
    assert isinstance(told, str)
    assert why in told


def test_what_torchao_has_beside() -> None:
    from torchao.quantization import IntxWeightOnlyConfig

    layer = quantised(IntxWeightOnlyConfig(), torch.float32)
    assert frozen_weight(layer) == "Linear with a weight of class IntxUnpackedToInt8Tensor"
