"""LoRALinear and LoRALayer: what they compute, share, refuse and survive."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRALayer, LoRALinear
from fastlora.nn import LoRAModule
from tests.lora_models import randomize_adapters, same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
Make = Callable[..., LoRAModule]
KINDS = pytest.mark.parametrize("make", [LoRALinear.from_linear, LoRALayer], ids=["LoRALinear", "LoRALayer"])


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_first_output_is_the_frozen_layers_bit_for_bit(
    make: Make, dtype: torch.dtype, bias: bool, dropout: float
) -> None:
    linear = nn.Linear(24, 20, bias=bias, dtype=dtype)
    x = torch.randn(2, 7, 24, dtype=dtype)
    expected = linear(x)
    layer = make(linear, rank=4, dropout=dropout)
    assert layer.training
    assert torch.equal(layer(x), expected)


@KINDS
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
def test_computes_the_papers_formula(make: Make, rslora: bool) -> None:
    linear = nn.Linear(9, 5, dtype=torch.float64)
    layer = randomize_adapters(make(linear, rank=4, alpha=6, rslora=rslora))
    assert isinstance(layer, LoRAModule)
    scaling = 6 / math.sqrt(4) if rslora else 6 / 4
    assert layer.scaling == scaling
    x = torch.randn(3, 9, dtype=torch.float64)
    expected = linear(x) + scaling * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_a_is_drawn_as_nn_linear_draws_and_nothing_else_is() -> None:
    linear = nn.Linear(64, 32)
    torch.manual_seed(3)
    layer = LoRALinear.from_linear(linear, rank=8)
    after = torch.rand(1)
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty(8, 64), a=math.sqrt(5))
    assert torch.equal(layer.lora_A, expected)
    assert torch.equal(after, torch.rand(1))
    assert 0.9 / 8 < layer.lora_A.abs().max() <= 1 / 8
    assert not layer.lora_B.any()


@KINDS
def test_only_the_adapter_trains(make: Make) -> None:
    layer = make(nn.Linear(6, 4), rank=2)
    layer(torch.randn(3, 6)).square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    assert layer.adapter_params() == ["lora_A", "lora_B"]
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert gradients["lora_B"] is not None
    assert gradients["lora_B"].any()
    # dA = scaling · (dY·B)ᵀ·x, and B is still zero
    assert gradients["lora_A"] is not None
    assert not gradients["lora_A"].any()
    assert all(g is None for name, g in gradients.items() if not name.startswith("lora_"))


def test_dropout_acts_in_training_only() -> None:
    layer = randomize_adapters(LoRALinear(16, 8, rank=4, dropout=0.5))
    x = torch.randn(4, 16)
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_from_linear_shares_and_keeps_ties() -> None:
    embedding = nn.Embedding(10, 6)
    linear = nn.Linear(6, 10)
    linear.weight = embedding.weight
    linear.eval()
    layer = LoRALinear.from_linear(linear, rank=2)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is embedding.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.training
    assert repr(layer) == (
        "LoRALinear(in_features=6, out_features=10, bias=True, rank=2, alpha=32, lora_dropout=0)"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapter_dtype(dtype: torch.dtype) -> None:
    expected = torch.float32 if dtype.itemsize == 2 else dtype
    assert LoRALinear(4, 4, rank=1, dtype=dtype).lora_A.dtype == expected
    layer = LoRALinear(4, 4, rank=1, dtype=dtype, adapter_dtype=torch.bfloat16)
    assert (layer.lora_B.dtype, layer.weight.dtype) == (torch.bfloat16, dtype)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@KINDS
def test_copies_are_whole_and_independent(make: Make, duplicate: Callable[[Any], Any], merged: bool) -> None:
    layer = make(nn.Linear(6, 5), rank=2, dropout=0.25, rslora=True).eval()
    randomize_adapters(layer)
    x = torch.randn(3, 6)
    if merged:
        layer.merge()
    expected = layer(x)
    twin = duplicate(layer)
    assert same_bits(twin(x), expected)
    assert repr(twin) == repr(layer)
    assert (twin.scaling, twin.lora_dropout, twin.merged) == (layer.scaling, 0.25, merged)
    with torch.no_grad():
        twin.unmerge()
        for parameter in twin.parameters():
            parameter.zero_()
    assert same_bits(layer(x), expected)


@KINDS
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_conversion_moves_everything(make: Make, merged: bool) -> None:
    layer = make(nn.Linear(6, 5), rank=2)
    if merged:
        layer.merge()
    layer.to(torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    x = torch.randn(2, 6, dtype=torch.float64)
    assert layer(x).dtype == torch.float64
    layer.unmerge()
    assert layer(x).dtype == torch.float64
    assert {p.device.type for p in layer.to("meta").parameters()} == {"meta"}


@KINDS
def test_loads_a_plain_state_dict_and_refuses_half_an_adapter(make: Make) -> None:
    plain, layer = nn.Linear(6, 5), make(nn.Linear(6, 5), rank=2)
    randomize_adapters(layer)
    adapter = layer.lora_A.clone()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(layer.to_base()(x), plain(x))
    assert torch.equal(layer.lora_A, adapter)
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B"):
        layer.load_state_dict({**plain.state_dict(), "lora_A": adapter})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_C"):
        layer.load_state_dict({**plain.state_dict(), "lora_C": adapter})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({"bias": plain.bias})
    twin = make(nn.Linear(6, 5), rank=2)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


def test_meta_construction_and_reset() -> None:
    layer = LoRALinear(6, 5, rank=2, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert layer.weight.isfinite().all()
    assert layer.lora_A.any()
    assert not layer.lora_B.any()
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@KINDS
def test_compiles_without_graph_break(make: Make, merged: bool) -> None:
    torch.compiler.reset()
    layer = make(nn.Linear(6, 5), rank=2)
    randomize_adapters(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6, requires_grad=True)
    if merged:
        layer.merge()
    torch.testing.assert_close(compiled(x), layer(x))
    if not merged:
        expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B])
        actual = torch.autograd.grad(compiled(x).square().sum(), [x, layer.lora_A, layer.lora_B])
        torch.testing.assert_close(actual, expected)


def test_autocast_computes_in_16_bits() -> None:
    layer = randomize_adapters(LoRALinear(16, 8, rank=4))
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)


def test_public_names() -> None:
    assert fastlora.LoRALinear is LoRALinear
    assert set(fastlora.__all__) <= set(dir(fastlora))
