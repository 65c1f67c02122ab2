"""Our layers on quantised ones while they are merged: moved, cast, written, left as plain ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn

import fastlora
from tests.test_nn_quantised import BASES, EIGHT_BITS, IN, OUT, awake, bits, inputs

MOVES: dict[str, tuple[Callable[[nn.Module], Any], torch.dtype]] = {
    "float": (lambda module: module.float(), torch.float32),
    "bfloat16": (lambda module: module.bfloat16(), torch.bfloat16),
    "to float64": (lambda module: module.to(torch.float64), torch.float64),
    "to cpu": (lambda module: module.to("cpu"), torch.float32),
    "cpu": (lambda module: module.cpu(), torch.float32),
}


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrapped", [False, True], ids=["layer", "wrapper"])
def test_a_merged_layer_is_left_as_a_plain_one(
    wrapped: bool, dtype: torch.dtype, compute: torch.dtype | None
) -> None:
    """Called with what the model that it was quantised in is called with."""
    frozen: Any = Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=compute).to(dtype).to("cpu")
    x = inputs(dtype)
    # casts its bias
    frozen(x)
    make: Any = fastlora.LoRALayer if wrapped else fastlora.LoRALinear.from_linear
    layer = awake(make(frozen, rank=4))
    layer.merge()
    plain = layer.to_base()
    assert type(plain) is nn.Linear
    assert plain.weight.dtype is plain.bias.dtype is dtype
    assert torch.equal(plain(x), layer(x))
    bias = frozen.bias
    layer.unmerge()
    assert layer.to_base().bias is bias


@pytest.mark.parametrize("requantise", [False, True], ids=["copied", "quantised again"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["layer", "wrapper"])
@pytest.mark.parametrize("base", ["nf4", "fp4", "llm.int8"])
@pytest.mark.parametrize("move", MOVES)
def test_merged_layers_are_moved_and_cast(move: str, base: str, wrapped: bool, requantise: bool) -> None:
    frozen = (BASES | EIGHT_BITS)[base]()
    weight, stored = frozen.weight, bits(frozen.weight)
    make: Any = fastlora.LoRALayer if wrapped else fastlora.LoRALinear.from_linear
    layer = awake(make(frozen, rank=4))
    layer.merge(requantise=requantise)
    merged = layer.to_base().weight
    x = inputs()
    before = layer(x)
    to, dtype = MOVES[move]
    # inside a model it is moved without a call of its own
    to(nn.Sequential(layer))
    found = layer(x.to(dtype))
    assert found.dtype is dtype
    eps = max(torch.finfo(each).eps for each in (dtype, x.dtype))
    assert (found - before).norm() < 4 * eps * before.norm()
    assert type(layer.to_base().weight) is type(merged)
    layer.unmerge()
    assert layer.to_base().weight is weight
    assert bits(weight) == stored


@pytest.mark.parametrize("wrapped", [False, True], ids=["layer", "wrapper"])
def test_statistics_of_a_weight_that_was_quantised_again_go_with_it(wrapped: bool) -> None:
    """Into state dicts, and where FSDP leaves bare bytes, into the layer."""
    frozen = BASES["nf4"]()
    names = set(frozen.state_dict())
    make: Any = fastlora.LoRALayer if wrapped else fastlora.LoRALinear.from_linear
    layer = awake(make(frozen, rank=4))
    layer.merge(requantise=True)
    base, x = layer.to_base(), inputs()
    expected, state = layer(x), layer.state_dict()
    assert set(state) == names
    weight = Params4bit.from_prequantized(
        state["weight"],
        {name.removeprefix("weight."): t for name, t in state.items() if name.startswith("weight.")},
        device="cpu",
    )
    values = dequantize_4bit(weight.data, weight.quant_state)
    torch.testing.assert_close(nn.functional.linear(x, values, base.bias), expected)
    owner = layer.original_layer if wrapped else layer
    owner.weight = nn.Parameter(owner.weight.data, requires_grad=False)
    assert torch.equal(layer(x), expected)
