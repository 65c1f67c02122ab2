"""Our own layers on quantised ones: bytes shared, names kept, never quantised again in silence."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers.integrations.finegrained_fp8 import FP8Linear

import fastlora
from tests.quantised import four_bit, read

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
    assert layer.weight.dtype is torch.bfloat16
    assert layer.weight.shape == (OUT, IN)
    exact = dense(frozen).weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.weight, exact.bfloat16())
    found = layer(x)
    assert found.dtype is x.dtype
    torch.testing.assert_close(found, before, rtol=0.05, atol=0.05)
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
    "torchao int8": lambda: torchao(Int8WeightOnlyConfig()),
    "torchao float8": lambda: torchao(Float8WeightOnlyConfig()),
}


@pytest.mark.parametrize("base", EIGHT_BITS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["layer", "wrapper"])
def test_the_life_of_a_layer_of_eight_bits(base: str, wrapped: bool) -> None:
    frozen = EIGHT_BITS[base]()
    weight, state = frozen.weight, {name: str(t) for name, t in frozen.state_dict().items()}
    values = read(frozen).dense(torch.float32)
    make: Any = fastlora.LoRALayer if wrapped else fastlora.LoRALinear.from_linear
    layer = awake(make(frozen, rank=4))
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict({"weight": values, "bias": frozen.bias})
    dense = make(plain, rank=4)
    dense.lora_A.data, dense.lora_B.data = layer.lora_A.data, layer.lora_B.data
    x = inputs()
    before = run(layer, x)
    for found, expected in zip(before, run(dense, x), strict=True):
        torch.testing.assert_close(found, expected)
    layer.merge()
    assert layer.to_base().weight.dtype is torch.bfloat16
    torch.testing.assert_close(layer(x), before[0], rtol=0.05, atol=0.1)
    layer.unmerge()
    assert layer.to_base().weight is weight
    assert type(layer.to_base()) is type(frozen)
    assert {name: str(t) for name, t in layer.to_base().state_dict().items()} == state
    assert torch.equal(layer(x), before[0])
    if base == "llm.int8":
        layer.merge(requantise=True)
        assert 0 < layer.requantisation_error < 0.02
    else:
        with pytest.raises(ValueError, match="a weight of bitsandbytes to quantise again"):
            layer.merge(requantise=True)
        assert not layer.merged


class Net(nn.Module):
    """Two quantised layers, of which one is called by its attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = four_bit(IN, IN), four_bit(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def test_the_life_of_an_adapted_model(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, x = Net(), inputs()
    frozen = model(x)
    kinds, states = [type(m) for m in model.modules()], model.state_dict()
    fastlora.apply_lora(model, rank=4, target_modules=["first", "second"])
    torch.testing.assert_close(model(x), frozen)
    for layer in (model.first, model.second):
        awake(layer)
    adapted = model(x)
    fastlora.merge_adapters(model)
    size = (IN * IN + OUT * IN) * 2 / 2**20
    assert caplog.messages == [
        f"2 quantised weights were merged into bfloat16 copies of {size:.1f} MiB; unmerge_adapters puts the "
        "quantised ones back, requantise=True quantises the merged ones"
    ]
    fastlora.unmerge_adapters(model)
    assert torch.equal(model(x), adapted)
    fastlora.merge_adapters(model, requantise=True)
    assert caplog.messages[1].startswith("2 merged weights were quantised again: relative error 0.")
    fastlora.unmerge_adapters(model)
    fastlora.save_adapter(model, tmp_path / "adapter")
    other = fastlora.load_adapter(Net(), tmp_path / "adapter")
    assert torch.equal(other(x), adapted)
    fastlora.remove_adapters(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), frozen)


def test_adapters_in_the_format_of_peft(tmp_path: Path) -> None:
    """A PEFT model of the same quantised layers reads what was trained here, and the other way round."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, x = fastlora.apply_lora(Net(), rank=4, target_modules=["first", "second"]), inputs()
    for layer in (model.first, model.second):
        awake(layer)
    fastlora.save_adapter(model, tmp_path / "ours")
    theirs: Any = PeftModel.from_pretrained(Net(), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(x), model(x))
    trained: Any = get_peft_model(Net(), LoraConfig(r=3, target_modules=["first", "second"]))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(fastlora.load_adapter(Net(), tmp_path / "theirs")(x), trained(x))


def test_bottleneck_adapters_and_named_ones() -> None:
    model, x = Net(), inputs()
    frozen = model(x)
    fastlora.apply_adapters(model, target_modules=["first"], adapter_size=4, hidden_size=IN)
    fastlora.apply_lora(model, rank=4, target_modules=["second"])
    fastlora.add_adapter(model, "other", rank=2)
    torch.testing.assert_close(model(x), frozen)
    fastlora.set_adapter(model, "other")
    model(x).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    assert all("adapter" in name or "lora" in name for name in trained)


@pytest.mark.parametrize("start", [fastlora.init.pissa_, fastlora.init.olora_])
def test_starts_out_of_a_quantised_weight(start: Callable[..., Any]) -> None:
    model, x = Net(), inputs()
    frozen = model(x)
    start(fastlora.apply_lora(model, rank=4, target_modules=["first", "second"]))
    assert model.first.lora_B.any()
    torch.testing.assert_close(model(x), frozen, rtol=1e-4, atol=1e-4)


def test_an_evaluation_between_two_steps_changes_nothing() -> None:
    """On CPUs with AVX512-BF16 bitsandbytes rewrites 4-bit weights then, and gives x a gradient of zeros."""
    model = Net()
    for layer in (model.first, model.second):
        layer.support_avx512bf16_for_cpu = True
    # the first one stays bitsandbytes'
    fastlora.apply_lora(model, rank=4, target_modules=["second"])
    x = inputs()
    before = run(model, x)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    assert all(map(torch.equal, run(model, x), before))


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


def test_what_no_weight_can_hold_is_told_when_a_model_is_saved(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """``save_pretrained`` writes updates into weights; quantised ones hold none."""

    class Saved(Net):
        def save_pretrained(self, folder: Path) -> None:
            torch.save(self.state_dict(), folder / "model.pt")

    model = fastlora.apply_lora(Saved(), rank=4, target_modules=["first"])
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "LoRA that no weight can hold (1)" in caplog.text
    state = torch.load(tmp_path / "model.pt")
    assert torch.equal(state["first.weight"], model.first.weight.data)
    assert "first.lora_A" in state
