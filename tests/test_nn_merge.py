"""Folding the update into the weight and taking it out again, bit for bit."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastlora import LoRALayer, LoRALinear, LoRAMultiheadAttention
from fastlora.nn import LoRAModule
from fastlora.nn.lora import folding
from tests.lora_models import randomize_adapters, same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def linear(dtype: torch.dtype) -> LoRAModule:
    return LoRALinear(24, 20, rank=4, dtype=dtype)


def layer(dtype: torch.dtype) -> LoRAModule:
    return LoRALayer(nn.Linear(24, 24, dtype=dtype), rank=4)


def attention(dtype: torch.dtype) -> LoRAModule:
    return LoRAMultiheadAttention(24, 4, batch_first=True, rank=4, dtype=dtype)


MAKERS = pytest.mark.parametrize("make", [linear, layer, attention])
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Make = Callable[[torch.dtype], LoRAModule]


def call(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.MultiheadAttention):
        x = module(x, x, x, need_weights=False)[0]
        return x
    out = module(x)
    assert isinstance(out, Tensor)
    return out


def rms_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).square().mean().sqrt().item()


@MAKERS
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_merged_error_is_at_most_twice_the_unmerged(make: Make, dtype: torch.dtype) -> None:
    """Both against float64, the unmerged layer in the same dtype being what eager LoRA computes."""
    torch.manual_seed(0)
    module = make(dtype).eval()
    randomize_adapters(module)
    x = torch.randn(16, 12, 24).to(dtype)
    exact = call(copy.deepcopy(module).double(), x.double())
    unmerged = call(module, x)
    module.merge()
    merged = call(module, x)
    assert rms_error(merged, exact) <= 2 * rms_error(unmerged, exact)


@MAKERS
def test_merged_and_unmerged_and_plain_agree_in_float64(make: Make) -> None:
    module = make(torch.float64).eval()
    randomize_adapters(module)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    unmerged = call(module, x)
    module.merge()
    torch.testing.assert_close(call(module, x), unmerged, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(call(module.to_base(), x), unmerged, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("elements", [1, 640, 2**22], ids=["a-row", "ten-rows", "all"])
def test_the_merged_weight_is_rounded_once(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "_ELEMENTS", elements)
    module = LoRALinear(64, 63, rank=4, dtype=dtype)
    randomize_adapters(module)
    exact = module.weight.double() + module.scaling * module.lora_B.double() @ module.lora_A.double()
    module.merge()
    assert torch.equal(module.weight, exact.to(dtype))


@MAKERS
@BY_DTYPE
def test_unmerge_restores_the_same_bits(make: Make, dtype: torch.dtype) -> None:
    module = make(dtype)
    randomize_adapters(module)
    parameters = dict(module.named_parameters())
    values = {name: p.clone() for name, p in parameters.items()}
    for _ in range(3):
        module.merge()
        assert module.merged
        assert not same_bits(module._weight(), values[weight_name(module)])
        module.unmerge()
    assert not module.merged
    assert all(p is parameters[name] for name, p in module.named_parameters())
    assert all(same_bits(p, values[name]) for name, p in module.named_parameters())


@MAKERS
def test_doing_it_twice_changes_nothing(make: Make) -> None:
    module = make(torch.float32)
    module.unmerge()
    randomize_adapters(module)
    module.merge()
    once = module._weight().clone()
    module.merge()
    assert same_bits(module._weight(), once)
    assert "merged=True" in repr(module)


@MAKERS
def test_while_merged_the_state_dict_is_the_plain_layers(make: Make) -> None:
    module = make(torch.bfloat16)
    randomize_adapters(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.merge()
    plain = module.to_base().state_dict()
    outer = nn.Sequential(module)
    while_merged = {name.removeprefix("0."): tensor for name, tensor in outer.state_dict().items()}
    assert module.merged
    assert while_merged.keys() == plain.keys()
    assert all(same_bits(while_merged[name], value) for name, value in plain.items())
    module.unmerge()
    assert all(same_bits(tensor, before[name]) for name, tensor in module.state_dict().items())


@MAKERS
def test_loading_into_a_merged_layer_unmerges_first(make: Make) -> None:
    module, other = make(torch.float32), make(torch.float32)
    randomize_adapters(module)
    randomize_adapters(other, seed=2)
    original = module._weight()
    module.merge()
    module.load_state_dict(other.state_dict())
    assert not module.merged
    assert module._weight() is original
    x = torch.randn(2, 5, 24)
    assert torch.equal(call(module.eval(), x), call(other.eval(), x))


@MAKERS
def test_conversion_while_merged(make: Make) -> None:
    module = make(torch.float32)
    randomize_adapters(module)
    original = module._weight()
    reference = copy.deepcopy(module).to(torch.bfloat16)
    module.merge()
    module.to(torch.bfloat16)
    assert module.merged
    assert module._weight().dtype == torch.bfloat16
    module.unmerge()
    assert module._weight() is original
    assert same_bits(module._weight(), reference._weight())


def test_a_tied_weight_keeps_its_values() -> None:
    embedding = nn.Embedding(10, 6)
    plain = nn.Linear(6, 10)
    plain.weight = embedding.weight
    module = LoRALinear.from_linear(plain, rank=2)
    randomize_adapters(module)
    before = embedding.weight.clone()
    module.merge()
    assert same_bits(embedding.weight, before)
    assert not same_bits(module.weight, before)
    model = nn.ModuleList([embedding, module]).half()
    module.unmerge()
    assert module.weight is embedding.weight
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_autocast_does_not_round_the_merged_weight() -> None:
    module = linear(torch.float32)
    randomize_adapters(module)
    module.merge()
    expected = module._weight().clone()
    module.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        module.merge()
    assert same_bits(module._weight(), expected)


@MAKERS
def test_a_fresh_start_unmerges(make: Make) -> None:
    module = make(torch.float32)
    randomize_adapters(module)
    module.merge()
    module.reset_lora_parameters()
    assert not module.merged
    assert not module.lora_B.any()
    assert module.lora_A.any()


def weight_name(module: LoRAModule) -> str:
    return {LoRALayer: "original_layer.weight", LoRAMultiheadAttention: "in_proj_weight"}.get(
        type(module), "weight"
    )
