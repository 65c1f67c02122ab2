"""Layers of other libraries with quantised weights, and what is asked of every one of them."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from torch import Tensor, nn

from fastlora import reference
from fastlora.functional import lora_linear
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.read import frozen_weight
from tests.exactness import assert_as_exact

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def four_bit(
    n: int, k: int, quant_type: str = "nf4", blocksize: int = 64, *, nested: bool = True, **settings: object
) -> Any:
    """bitsandbytes' layer with a random weight ``[n, k]``."""
    layer: Any = Linear4bit(k, n, compress_statistics=nested, quant_type=quant_type, **settings)
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


def llm_int8(n: int, k: int) -> Any:
    layer: Any = Linear8bitLt(k, n, has_fp16_weights=False)
    return layer.to("cpu")


def compressed(n: int, k: int, dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> Any:
    """A linear layer of this dtype that compressed-tensors has compressed."""
    model = nn.Sequential(nn.Linear(k, n, dtype=dtype))
    weights = QuantizationArgs(num_bits=8, **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}))
    layer: Any = model[0]
    largest = 448 if weights.type == "float" else 127
    with torch.no_grad():
        layer.weight_scale.copy_(
            layer.weight.abs().max() * (1 + torch.rand(layer.weight_scale.shape)) / largest
        )
    # weights alone would be packed into words
    compress_module(layer, CompressionFormat(f"{arguments['type']}-quantized"))
    return layer


def to_nf4(values: Tensor, block_size: int, scaler_block_size: int) -> Any:
    """torchao's ``NF4Tensor``."""
    try:
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
    except ImportError:
        # of 0.17
        from torchao.dtypes import nf4tensor as nf4_tensor
    return nf4_tensor.to_nf4(values, block_size, scaler_block_size)


def held(weight: Any) -> nn.Linear:
    """A layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def read(layer: nn.Module) -> FrozenWeight:
    """The layer's weight, which is understood."""
    weight = frozen_weight(layer)
    assert isinstance(weight, FrozenWeight), weight
    return weight


def assert_rows_are(
    weight: FrozenWeight, theirs: Callable[[torch.dtype], Tensor], dtype: torch.dtype
) -> None:
    """All rows at once and each part alone are the same bits as the library's own."""
    expected = theirs(dtype)
    dense = weight.dense(dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, expected)
    rows, step = weight.shape[0], weight.row_step
    for start in range(0, rows, step):
        # up to where a block ends, within one, and all
        for stop in {min(start + step, rows), start + 1, rows}:
            assert torch.equal(weight.dense(dtype, slice(start, stop)), expected[start:stop]), (start, stop)


def assert_scale_is_apart(weight: FrozenWeight, apart: bool) -> None:
    """The factors of W's rows can multiply sums over what is stored, or the weight says that they can't."""
    scale = weight.scale
    assert (scale is not None) == weight.is_decodable == apart
    if scale is not None:
        assert scale.dtype == torch.float32
        assert torch.equal(weight.tensors[0].float() * scale[:, None], weight.dense(torch.float32))


def assert_as_exact_as_dense(weight: FrozenWeight, dtype: torch.dtype, dropout: float) -> None:
    """y and the gradients are the bits of a call over the dense weight, and no further off than eager."""
    n, k = weight.shape
    m, rank = 9, 4
    draws = [torch.randn(m, k), torch.randn(rank, k) * k**-0.5, torch.randn(n, rank) * rank**-0.5]
    operands = [draw.to(dtype) for draw in (*draws, torch.randn(n), torch.randn(m, n))]

    def trained(weight: FrozenWeight | Tensor) -> list[Tensor]:
        x, a, b, bias, dy = operands
        inputs = [t.detach().requires_grad_() for t in (x, a, b)]
        generator = torch.Generator().manual_seed(1)
        settings: Any = {"scaling": 1.7, "dropout": dropout, "generator": generator}
        y = lora_linear(inputs[0], weight, bias, inputs[1], inputs[2], **settings)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    def eager(operands: list[Tensor]) -> list[Tensor]:
        x, a, b, bias, dy, dense = operands
        inputs = [t.detach().requires_grad_() for t in (x, a, b)]
        y = reference.lora_linear(inputs[0], dense, bias, inputs[1], inputs[2], scaling=1.7)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    dense = weight.dense(dtype)
    got = trained(weight)
    assert all(map(torch.equal, got, trained(dense)))
    if not dropout:
        assert_as_exact(("y", "dX", "dA", "dB"), got, eager, [*operands, dense])


def shapes_filled(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> list[tuple[int, ...]]:
    """Shapes of what these functions, which fill the last tensor that they are given, fill from now on."""
    seen: list[tuple[int, ...]] = []

    def watched(fill: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor, **settings: Any) -> Any:
            seen.append(tuple(tensors[-1].shape))
            return fill(*tensors, **settings)

        return run

    for name in names:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return seen
