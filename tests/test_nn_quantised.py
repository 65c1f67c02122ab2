"""Our own layers on quantised ones: bytes shared, names kept, never quantised again in silence."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from compressed_tensors.compressors.base import decompress_module
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers.integrations.finegrained_fp8 import FP8Linear

import fastlora
from tests.quantised import compressed, four_bit, read

OUT, IN = 96, 128
BASES: dict[str, Callable[..., Any]] = {
    "nf4": lambda **settings: four_bit(OUT, IN, **{"compute_dtype": torch.float32, **settings}),
    "fp4": lambda **settings: four_bit(
        OUT, IN, "fp4", 32, nested=False, **{"compute_dtype": torch.float32, **settings}
    ),
    "nf4 stored as bfloat16": lambda **settings: four_bit(
        OUT, IN, **{"compute_dtype": torch.float32, "quant_storage": torch.bfloat16, **settings}
    ),
}


def dense(base: Any) -> nn.Linear:
    """A plain layer with the values that bitsandbytes makes of a quantised one."""
    linear = nn.Linear(IN, OUT)
    values = dequantize_4bit(base.weight.data, base.weight.quant_state)
    linear.load_state_dict({"weight": values.float(), "bias": base.bias})
    return linear


def bits(tensor: Tensor) -> list[int]:
    """Its bytes, of which floats may be no numbers."""
    found: list[int] = tensor.detach().contiguous().view(torch.uint8).flatten().tolist()
    return found


def awake(layer: Any) -> Any:
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)


def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of x and whatever trains."""
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.double().square().sum(), [x, *trained])]


@pytest.mark.parametrize("base", BASES)
def test_a_fresh_layer_computes_as_the_frozen_one(base: str) -> None:
    frozen = BASES[base]()
    layer = fastlora.LoRALinear.from_linear(frozen, rank=4)
    assert isinstance(layer, type(frozen))
    assert layer.weight is frozen.weight
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    x = inputs()
    torch.testing.assert_close(layer(x), frozen(x))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["layer", "wrapper"])
def test_outputs_and_gradients_are_those_of_the_dense_layer(base: str, wrapped: bool) -> None:
    frozen = BASES[base]()
    make: Any = fastlora.LoRALayer if wrapped else fastlora.LoRALinear.from_linear
    layer, plain = awake(make(frozen, rank=4)), make(dense(frozen), rank=4)
    plain.lora_A.data, plain.lora_B.data = layer.lora_A.data, layer.lora_B.data
    x = inputs()
    for found, expected in zip(run(layer, x), run(plain, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_cast_as_the_frozen_layer_casts_them(
    compute: torch.dtype | None, dtype: torch.dtype
) -> None:
    frozen = BASES["nf4"](compute_dtype=compute)
    layer = fastlora.LoRALinear.from_linear(frozen, rank=4)
    x = inputs(dtype)
    found, expected = layer(x), frozen(x)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("base", BASES)
def test_state_dicts_have_the_names_of_bitsandbytes(base: str) -> None:
    frozen = BASES[base]()
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    layer = awake(fastlora.LoRALinear.from_linear(frozen, rank=4))
    state = layer.state_dict()
    assert set(state) == {*before, "lora_A", "lora_B"}
    assert all(bits(state[name]) == bits(tensor) for name, tensor in before.items())
    layer.merge()
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("base", BASES)
def test_merging_copies_and_unmerging_restores_the_bits(base: str) -> None:
    frozen = BASES[base]()
    layer = awake(fastlora.LoRALinear.from_linear(frozen, rank=4))
    weight, stored, x = layer.weight, bits(layer.weight), inputs()
    before = layer(x)
    layer.merge()
    assert layer.weight.shape == (OUT, IN)
    exact = dense(frozen).weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.weight, exact.float())
    torch.testing.assert_close(layer(x), before)
    assert type(layer.to_base()) is nn.Linear
    layer.unmerge()
    assert layer.weight is weight
    assert bits(layer.weight) == stored
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("base", BASES)
def test_quantising_the_merged_weight_says_what_it_costs(base: str) -> None:
    frozen = BASES[base]()
    layer = awake(fastlora.LoRALinear.from_linear(frozen, rank=4))
    stored, x = bits(layer.weight), inputs()
    before = layer(x)
    exact = dense(frozen).weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge(requantise=True)
    assert type(layer.weight) is type(frozen.weight)
    assert layer.weight.shape == (len(stored) // layer.weight.itemsize, 1)
    values = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    error = ((values - exact).norm() / exact.norm()).item()
    assert error > 0.01
    assert layer.requantisation_error == pytest.approx(error, rel=1e-3)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, values.float(), layer.bias))
    layer.unmerge()
    assert layer.requantisation_error is None
    assert bits(layer.weight) == stored
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way: str) -> None:
    layer = awake(fastlora.LoRALinear.from_linear(BASES["nf4"](), rank=4))
    copied = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert type(copied) is type(layer)
    x = inputs()
    assert torch.equal(copied(x), layer(x))
    with torch.no_grad():
        copied.lora_B.zero_()
    assert not torch.equal(copied(x), layer(x))


def same(one: Any, other: Any) -> bool:
    """Whether two tensors, quantised ones too, hold the same."""
    if type(one) is not Tensor and hasattr(one, "dequantize"):
        one, other = one.dequantize(), other.dequantize()
    return one.dtype == other.dtype and bits(one) == bits(other)


def fp8() -> Any:
    """transformers' layer of FP8 checkpoints, whose own forward needs a GPU."""
    layer: Any = FP8Linear(IN, OUT, block_size=(32, 64), has_bias=True)
    layer.weight.data = torch.randn(OUT, IN).to(layer.weight.dtype)
    layer.weight_scale_inv.data = torch.rand(OUT // 32, IN // 64)
    nn.init.normal_(layer.bias)
    return layer


def torchao(config: Any) -> nn.Module:
    holder = nn.Sequential(nn.Linear(IN, OUT))
    quantize_(holder, config)
    return holder[0]


EIGHT_BITS: dict[str, Callable[[], Any]] = {
    "llm.int8": lambda: Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0).to("cpu"),
    "fp8": fp8,
    "compressed int8": lambda: compressed(OUT, IN, torch.float32, type="int", strategy="channel"),
    "compressed fp8": lambda: compressed(OUT, IN, torch.float32, type="float", strategy="channel"),
    "torchao int8": lambda: torchao(Int8WeightOnlyConfig(version=2)),
    "torchao float8": lambda: torchao(Float8WeightOnlyConfig()),
}


@pytest.mark.parametrize("base", EIGHT_BITS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["layer", "wrapper"])
def test_the_life_of_a_layer_of_eight_bits(base: str, wrapped: bool) -> None:
    frozen = EIGHT_BITS[base]()
    x = inputs()
    if base != "fp8" and not base.startswith("compressed"):
        # its state takes the statistics
        frozen(x)
    weight, state = frozen.weight, copy.deepcopy(frozen.state_dict())
    values = read(frozen).dense(torch.float32)
    make: Any = fastlora.LoRALayer if wrapped else fastlora.LoRALinear.from_linear
    layer = awake(make(frozen, rank=4))
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict({"weight": values, "bias": frozen.bias})
    dense = make(plain, rank=4)
    dense.lora_A.data, dense.lora_B.data = layer.lora_A.data, layer.lora_B.data
    before = run(layer, x)
    for found, expected in zip(before, run(dense, x), strict=True):
        torch.testing.assert_close(found, expected)
    layer.merge()
    assert set(layer.state_dict()) == {"weight", "bias"}
    merged = layer(x)
    torch.testing.assert_close(merged, before[0])
    torch.testing.assert_close(layer.to_base()(x), merged)

    def assert_restored() -> None:
        layer.unmerge()
        base = layer.to_base()
        assert base.weight is weight
        assert type(base) is type(frozen)
        assert base.state_dict().keys() == state.keys()
        assert all(same(tensor, state[name]) for name, tensor in base.state_dict().items())
        assert torch.equal(layer(x), before[0])

    assert_restored()
    if base == "llm.int8":
        layer.merge(requantise=True)
        assert 0 < layer.requantisation_error < 0.02
        again = layer(x)
        # bitsandbytes quantises x, too
        torch.testing.assert_close(layer.to_base()(x), again, rtol=0.1, atol=0.2)
        assert torch.equal(layer(x), again)
        assert_restored()
    else:
        with pytest.raises(ValueError, match="a weight of bitsandbytes to quantise again"):
            layer.merge(requantise=True)
        assert not layer.merged


@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_layer_that_compressed_tensors_decompresses_computes_the_same(kind: str) -> None:
    """As a model does that it loaded, on its first call."""
    frozen = compressed(OUT, IN, torch.float32, type=kind, strategy="channel")
    layer = awake(fastlora.LoRALinear.from_linear(frozen, rank=4))
    copied, base, x = copy.deepcopy(layer), layer.to_base(), inputs()
    assert base.forward.__self__ is base
    assert base.forward.__func__ is frozen.forward.__func__
    expected = layer(x)
    assert torch.equal(copied(x), expected)
    decompress_module(layer)
    assert layer.weight.dtype is torch.float32
    torch.testing.assert_close(layer(x), expected)
    decompress_module(base)
    layer.lora_B.data.zero_()
    torch.testing.assert_close(base(x), layer(x))


def rewritten() -> Any:
    layer = BASES["nf4"]()
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    return layer


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], Any, str]] = {
    "dora": (BASES["nf4"], {"dora": True}, ValueError, "a dense weight for DoRA"),
    "rewritten": (rewritten, {}, TypeError, "weights repacked for inference"),
    "meta": (lambda: Linear4bit(IN, OUT, device="meta"), {}, ValueError, "got a meta tensor"),
    "not quantised": (lambda: Linear4bit(IN, OUT), {}, TypeError, "not quantised yet"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason: str) -> None:
    make, options, error, words = REFUSED[reason]
    layer = make()
    before = {name: value for name, value in vars(layer).items() if name != "training"}
    with pytest.raises(error, match=words):
        fastlora.LoRALinear.from_linear(layer, rank=4, **options)
    assert {name: value for name, value in vars(layer).items() if name != "training"} == before
