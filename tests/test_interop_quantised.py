"""Accelerated PEFT models on quantised bases answer and learn as PEFT's own."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import fastlora
from fastlora.interop._peft_fused import Fused
from tests.peft_twins import assert_equal_runs, awake
from tests.quantised import four_bit

IN, OUT = 128, 96


class Net(nn.Module):
    """One layer, and what transformers says of a model that it loaded quantised."""

    def __init__(self, layer: nn.Module, loaded: str | None = None) -> None:
        super().__init__()
        self.layer = layer
        if loaded is not None:
            setattr(self, f"is_loaded_in_{loaded}", True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def nf4(dtype: torch.dtype, quant_type: str = "nf4", **settings: Any) -> Any:
    torch.manual_seed(0)
    return four_bit(OUT, IN, quant_type, **{"compute_dtype": dtype, **settings}).to(dtype)


def int8(dtype: torch.dtype) -> Any:
    """Of LLM.int8, with the threshold that transformers gives it."""
    torch.manual_seed(0)
    return Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0).to("cpu").to(dtype)


def torchao(dtype: torch.dtype, config: Any) -> Any:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(IN, OUT).to(dtype))
    quantize_(holder, config)
    return holder[0]


BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "nf4": lambda dtype: Net(nf4(dtype), "4bit"),
    "fp4": lambda dtype: Net(nf4(dtype, "fp4", nested=False), "4bit"),
    "nf4 in a plain module": lambda dtype: Net(nf4(dtype)),
    "int8": lambda dtype: Net(int8(dtype), "8bit"),
    "int8 in a plain module": lambda dtype: Net(int8(dtype)),
    "torchao int8": lambda dtype: Net(torchao(dtype, Int8WeightOnlyConfig())),
    "torchao float8": lambda dtype: Net(torchao(dtype, Float8WeightOnlyConfig())),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
}
# backward orders its sums in another way; a rounding error of the eager path is allowed this often
FACTOR = 2.0


def peft_model(base: str, dtype: torch.dtype, **settings: Any) -> Any:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **settings})
    model = awake(get_peft_model(BASES[base](dtype), config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # values that bfloat16 holds, to which A and B go
            parameter.data.copy_((0.1 * parameter).bfloat16())
    return model


def lora_layer(model: Any) -> Any:
    return model.base_model.model.layer


def exact_model(model: Any) -> Any:
    """The model in float64, its frozen weight as its library dequantises it."""
    base = lora_layer(model).base_layer
    weight = base.weight
    if isinstance(weight, Params4bit):
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(weight, Int8Params):
        values = weight.data * (base.state.SCB if weight.SCB is None else weight.SCB)[:, None] / 127
    else:
        values = weight.dequantize()
    linear = nn.Linear(IN, OUT).double()
    linear.load_state_dict({"weight": values.double(), "bias": base.bias.double()})
    exact = copy.deepcopy(model)
    lora_layer(exact).base_layer = linear.requires_grad_(False)
    return exact.double()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def run(model: Any, x: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """Output and every gradient, x's too."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.double().square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.detach(), "x": x.grad, **trained}


def is_fused(model: Any, x: Tensor) -> bool:
    layer = lora_layer(model)
    return isinstance(layer, Fused) and layer._parts(x) is not None


def assert_as_good(found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert found.keys() == eager.keys() == exact.keys()
    for name, true in exact.items():
        assert found[name].dtype == eager[name].dtype, name
        own, error = ((t.double() - true).norm().item() for t in (eager[name], found[name]))
        bound = FACTOR * own + 4 * torch.finfo(found[name].dtype).eps * true.norm().item()
        assert error <= bound, (name, error, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_outputs_and_gradients_are_those_of_peft(base: str, config: str, dtype: torch.dtype) -> None:
    # PEFT has no bias of LoRA's there
    settings = {} if base.startswith("torchao") and config == "bias" else CONFIGS[config]
    eager = peft_model(base, dtype, **settings)
    model = fastlora.accelerate(copy.deepcopy(eager))
    x = inputs(dtype)
    assert is_fused(model, x)
    assert_as_good(run(model, x), run(eager, x), run(exact_model(eager), x.double()))


@pytest.mark.parametrize("base", ["nf4", "int8", "torchao int8", "torchao float8"])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base: str, x: torch.dtype) -> None:
    """Layers of a model that ``prepare_model_for_kbit_training`` prepared are given float32."""
    eager = peft_model(base, torch.bfloat16)
    model = fastlora.accelerate(copy.deepcopy(eager))
    exact = run(exact_model(eager), inputs(x).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # others compute in x's dtype, or in autocast's
        assert is_fused(model, inputs(x)) == (base == "nf4" or x is torch.bfloat16)
    found, own = (run(each, inputs(x), autocast=True) for each in (model, eager))
    assert_as_good(found, own, exact)


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_the_dtype_that_the_layer_computes_in(
    compute: torch.dtype | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Without one, the first call decides: bitsandbytes keeps it for those that follow."""
    net = Net(nf4(torch.float32, compute_dtype=compute), "4bit")
    eager: Any = awake(get_peft_model(net, LoraConfig(r=4, target_modules=["layer"])))
    model = fastlora.accelerate(copy.deepcopy(eager))
    for dtype in dtypes:
        x = inputs(dtype)
        y, expected = model(x), eager(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
        assert is_fused(model, x) == (dtype == (compute or dtypes[0]))
    assert lora_layer(model).base_layer.compute_dtype == lora_layer(eager).base_layer.compute_dtype


@pytest.mark.parametrize("base", BASES)
def test_dropout_and_two_adapters(base: str) -> None:
    model = peft_model(base, torch.float32, lora_dropout=0.5)
    model.add_adapter("b", LoraConfig(r=3, target_modules=["layer"]))
    awake(model).base_model.set_adapter(["default", "b"])
    eager = copy.deepcopy(model)
    fastlora.accelerate(model)
    assert is_fused(model, inputs())
    found = run(model, inputs())
    assert not torch.equal(found["output"], run(eager, inputs())["output"])
    for each in (model, eager):
        lora_layer(each).lora_dropout.eval()
    assert_as_good(run(model, inputs()), run(eager, inputs()), run(exact_model(eager), inputs().double()))


def test_what_peft_computes_it_computes() -> None:
    """Without its adapters a model is its base, which is never called otherwise."""
    eager = peft_model("nf4", torch.float32)
    model = fastlora.accelerate(copy.deepcopy(eager))
    with model.disable_adapter(), eager.disable_adapter():
        assert torch.equal(model(inputs()), eager(inputs()))
    for each in (model, eager):
        with pytest.warns(UserWarning, match="4-bit linear may get different generations"):
            each.merge_adapter()
    assert torch.equal(model(inputs()), eager(inputs()))
    for each in (model, eager):
        with pytest.warns(UserWarning, match="4-bit linear may get different generations"):
            each.unmerge_adapter()
    assert is_fused(model, inputs())
    torch.testing.assert_close(model(inputs()), eager(inputs()))


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_accelerated_and_restored(base: str, way: str) -> None:
    eager = peft_model(base, torch.float32)
    model = fastlora.accelerate(copy.deepcopy(eager))
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert is_fused(copied, inputs())
    expected = run(eager, inputs())
    assert_equal_runs(run(copied, inputs()), expected)
    fastlora.restore(copied)
    assert type(lora_layer(copied)) is type(lora_layer(eager))
    assert_equal_runs(run(copied, inputs()), expected, exactly=True)
    assert is_fused(model, inputs())


def as_it_is(layer: Any) -> None:
    """Changes nothing."""


def forward_of_its_own(layer: Any) -> None:
    base = layer.base_layer
    base.forward = base.forward


REASONS: dict[str, tuple[str, dict[str, Any], Callable[[Any], object], str]] = {
    "dora": ("nf4", {"use_dora": True}, as_it_is, "with DoRA beside a quantised weight"),
    "a hook": (
        "nf4",
        {},
        lambda layer: layer.base_layer.register_forward_hook(lambda *call: None),
        "with hooks on base_layer",
    ),
    "a forward": (
        "nf4 in a plain module",
        {},
        forward_of_its_own,
        "with a forward of its own in base_layer",
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_not_known_is_left_and_told(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    base, settings, change, words = REASONS[reason]
    model = peft_model(base, torch.float32, **settings)
    kind = type(lora_layer(model))
    change(lora_layer(model))
    fastlora.accelerate(model)
    assert caplog.messages[-1:] == [
        f"0 of 1 LoRA layers run fused; left to PEFT: 1 lora.{kind.__name__} {words}"
    ]
    assert type(lora_layer(model)) is kind


@pytest.mark.parametrize("how", ["evaluated", "adapters disabled"])
def test_an_evaluation_between_two_steps_changes_nothing(how: str) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes rewrites 4-bit weights then, and gives x a gradient of zeros."""
    model = peft_model("nf4", torch.float32)
    lora_layer(model).base_layer.support_avx512bf16_for_cpu = True
    fastlora.accelerate(model)
    x = inputs()
    before = run(model, x)
    model.eval()
    with torch.no_grad():
        if how == "evaluated":
            # a bfloat16 call is PEFT's
            model(x.bfloat16())
        else:
            with model.disable_adapter():
                model(x)
    model.train()
    assert_equal_runs(run(model, x), before, exactly=True)


def test_weights_that_bitsandbytes_rewrote_are_refused() -> None:
    model = peft_model("nf4", torch.float32)
    weight = lora_layer(model).base_layer.weight
    weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match="1 of 1 that bitsandbytes rewrote for inference"):
        fastlora.accelerate(model)
    assert not isinstance(lora_layer(model), Fused)


def test_weights_that_are_rewritten_all_the_same_are_refused_where_peft_computes() -> None:
    model = fastlora.accelerate(peft_model("nf4", torch.float32))
    weight = lora_layer(model).base_layer.weight
    weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(RuntimeError, match="bitsandbytes rewrote for inference"):
        model(inputs().requires_grad_())


def test_restored_layers_may_be_rewritten_again() -> None:
    model = fastlora.accelerate(peft_model("nf4", torch.float32))
    base = lora_layer(model).base_layer
    assert not base.support_avx512bf16_for_cpu
    fastlora.restore(model)
    assert base.support_avx512bf16_for_cpu == bnb.functional.has_avx512bf16()
