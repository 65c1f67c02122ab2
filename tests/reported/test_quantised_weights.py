"""Quantised base weights: formats that others refuse, read wrongly or train without a gradient."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Float8Tensor, PerRow, PerTensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from transformers.integrations.finegrained_fp8 import FP8Linear

from fastlora.functional import lora_linear
from fastlora.ops.weights.four_bit import FourBitWeight
from fastlora.ops.weights.frozen import FrozenWeight
from tests.quantised import DTYPES, four_bit, read

ROOT = Path(__file__).parents[2]


def assert_trains(weight: FrozenWeight, dtype: torch.dtype) -> None:
    """Every gradient is there, and x's goes through the frozen weight."""
    n, k = weight.shape
    x = torch.randn(5, k, dtype=dtype, requires_grad=True)
    a, b = torch.randn(2, k, requires_grad=True), torch.zeros(n, 2, requires_grad=True)
    y = lora_linear(x, weight, None, a, b, scaling=1.0)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(5, n, dtype=dtype) @ weight.dense(dtype))
    assert b.grad is not None
    assert b.grad.all()
    assert a.grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [None, (16, 16)], ids=["per tensor", "in blocks"])
def test_a_base_of_fp8(block: tuple[int, int] | None, dtype: torch.dtype) -> None:
    layer: Any = FP8Linear(48, 32, block_size=block)
    layer.weight.data = torch.randn(32, 48).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data.fill_(0.05)
    assert_trains(read(layer), dtype)


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor()], ids=str)
def test_a_base_of_float8_with_quantised_inputs(granularity: Any) -> None:
    tensor = Float8Tensor.from_hp(
        torch.randn(32, 48, dtype=torch.bfloat16),
        granularity=granularity,
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=granularity),
    )
    layer = nn.Linear(48, 32, bias=False, device="meta")
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    assert_trains(read(layer), torch.bfloat16)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_in_fp32(quant_type: str) -> None:
    """Products of float32 numbers, none of them rounded to 16 bits on the way."""
    weight = read(four_bit(32, 64, quant_type, nested=False))
    assert isinstance(weight, FourBitWeight)
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], 1).view(-1, 64).int()
    exact = weight.table[codes].double() * weight.absmax.double()[:, None]
    assert torch.equal(weight.dense(torch.float32), exact.float().view(32, 64))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_that_read_as_nan(storage: torch.dtype) -> None:
    """Stored as floats, some pairs of bytes are NaN of many kinds, which an arithmetic copy makes one of."""
    layer = four_bit(256, 256, quant_storage=storage)
    # every fourth pair of bytes there is
    given = torch.arange(3, 2**16, 4).to(torch.uint16).view(torch.uint8)
    layer.weight.data = given.view(storage).view(-1, 1)
    assert layer.weight.isnan().any()
    weight = read(layer)
    assert isinstance(weight, FourBitWeight)
    assert torch.equal(weight.packed, given)
    assert_trains(weight, torch.float32)


DIGEST = """
import hashlib, importlib.util, torch
from tests.quantised import four_bit, read
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is not None
torch.manual_seed(5)
dense = read(four_bit(16, 96)).dense(torch.float32)
print(hashlib.sha256(dense.numpy().tobytes()).hexdigest())
"""


@pytest.mark.full
def test_a_folder_called_kernels_changes_no_value(tmp_path: Path) -> None:
    """bitsandbytes takes ours for Hugging Face's package of that name, and logs that it lacks something."""
    for name, folder in (("fastlora", ROOT), ("tests", ROOT), ("fastlora_kernels", ROOT / "kernels")):
        (tmp_path / name).symlink_to(folder / name)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", DIGEST]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    torch.manual_seed(5)
    dense = read(four_bit(16, 96)).dense(torch.float32)
    assert run.stdout.strip() == hashlib.sha256(dense.numpy().tobytes()).hexdigest()
