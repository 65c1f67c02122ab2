"""Accelerated PEFT layers that share x, of every dtype and over every kind of quantised weight."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers.integrations.finegrained_fp8 import FP8Linear

from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.read import frozen_weight
from tests.cases import cases
from tests.exactness import FACTOR
from tests.quantised import compressed, four_bit, llm_int8, to_nf4
from tests.sibling_models import WIDTH, Attention, an_input, apart, assert_as_apart, attention, groups, run

DTYPES = {
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "double": torch.float64,
}


# of the frozen layers, of A and B, and of the second sibling's
@pytest.mark.parametrize(
    ("base", "adapters", "second"),
    cases(
        [
            ("half", "float", "float"),
            ("bfloat16", "float", "float"),
            ("double", "double", "double"),
            ("float", "float", "bfloat16"),
            ("float", "float", "double"),
        ],
        [
            ("half", "half", "half"),
            ("bfloat16", "bfloat16", "bfloat16"),
            ("bfloat16", "float", "double"),
            ("bfloat16", "float", "bfloat16"),
            ("float", "float", "half"),
            ("double", "float", "double"),
        ],
    ),
)
def test_dtypes_of_layers_and_adapters(base: str, adapters: str, second: str) -> None:
    module = attention(Attention().to(DTYPES[base]))
    for layer in module.children():
        for part in (layer.lora_A, layer.lora_B):
            part.to(DTYPES[second if layer is module.k else adapters])
    x = an_input().to(DTYPES[base])
    exact = run(copy.deepcopy(module).double(), x.double())
    with apart():
        expected = run(module, x)
    with groups() as seen:
        found = run(module, x)
    assert seen == [3]
    # dX alone is summed in another way
    own, error = ((each["x"].double() - exact["x"]).norm() for each in (expected, found))
    assert error <= FACTOR * own
    assert found["x"].dtype == expected["x"].dtype
    for name, tensor in expected.items():
        assert name == "x" or torch.equal(found[name], tensor), name


def transformers_fp8() -> Any:
    """transformers' layer of FP8 checkpoints, whose own forward needs a GPU."""
    layer: Any = FP8Linear(WIDTH, WIDTH, block_size=(32, 64), has_bias=True)
    layer.weight.data = torch.randn(WIDTH, WIDTH).to(layer.weight.dtype)
    layer.weight_scale_inv.data = torch.rand(WIDTH // 32, WIDTH // 64)
    nn.init.normal_(layer.bias)
    return layer


def torchao(config: Any) -> nn.Module:
    holder = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    quantize_(holder, config)
    return holder[0]


def torchao_nf4() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 16), requires_grad=False)
    return layer


QUANTISED: dict[str, Callable[[], Any]] = {
    "nf4": lambda: four_bit(WIDTH, WIDTH),
    "fp4": lambda: four_bit(WIDTH, WIDTH, "fp4", nested=False),
    "LLM.int8": lambda: llm_int8(WIDTH, WIDTH),
    "transformers FP8": transformers_fp8,
    "compressed int8": lambda: compressed(WIDTH, WIDTH, torch.float32, type="int", strategy="channel"),
    "compressed FP8": lambda: compressed(WIDTH, WIDTH, torch.float32, type="float", strategy="channel"),
    "torchao int8": lambda: torchao(Int8WeightOnlyConfig(version=2)),
    "torchao FP8": lambda: torchao(Float8WeightOnlyConfig()),
    "torchao nf4": torchao_nf4,
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_layers_beside_a_dense_one(kind: str, dropout: float) -> None:
    parent: Any = Attention()
    parent.q, parent.k = QUANTISED[kind](), QUANTISED[kind]()
    module = attention(parent, dropout=dropout)
    assert isinstance(frozen_weight(module.q.base_layer), FrozenWeight)
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == [3]


def test_layers_of_several_quantisers() -> None:
    parent: Any = Attention()
    parent.q, parent.k, parent.v = (QUANTISED[kind]() for kind in ("nf4", "LLM.int8", "torchao FP8"))
    module = attention(parent)
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == [3]
