"""PEFT models of one quantised layer, their float64 yardstick, and how close a fused run has to come."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from fastlora.interop._peft_fused import Fused
from tests.peft_twins import awake
from tests.quantised import four_bit, to_nf4

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


def torchao_nf4(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT).to(dtype)
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 32), requires_grad=False)
    return layer


BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "nf4": lambda dtype: Net(nf4(dtype), "4bit"),
    "fp4": lambda dtype: Net(nf4(dtype, "fp4", nested=False), "4bit"),
    "nf4 in a plain module": lambda dtype: Net(nf4(dtype)),
    "int8": lambda dtype: Net(int8(dtype), "8bit"),
    "int8 in a plain module": lambda dtype: Net(int8(dtype)),
    "torchao int8": lambda dtype: Net(torchao(dtype, Int8WeightOnlyConfig(version=2))),
    "torchao float8": lambda dtype: Net(torchao(dtype, Float8WeightOnlyConfig())),
    "torchao nf4": lambda dtype: Net(torchao_nf4(dtype)),
}
# backward orders its sums in another way; a rounding error of the eager path is allowed this often
FACTOR = 2.0


def peft_model(base: str, dtype: torch.dtype, **settings: Any) -> Any:
    return peft_around(BASES[base](dtype), **settings)


def peft_around(net: Any, **settings: Any) -> Any:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **settings})
    model = awake(get_peft_model(net, config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # values that bfloat16 holds, to which A and B go
            parameter.data.copy_((0.1 * parameter).bfloat16())
    return model


def lora_layer(model: Any) -> Any:
    return model.base_model.model.layer


def twin(model: Any) -> Any:
    """A copy; it shares an ``NF4Tensor``, whose own copies are quantised again, in other blocks."""
    weight = lora_layer(model).base_layer.weight
    return copy.deepcopy(model, {id(weight): weight} if hasattr(weight, "get_original_weight") else {})


def exact_model(model: Any) -> Any:
    """The model in float64, its frozen weight as its library dequantises it."""
    base = lora_layer(model).base_layer
    weight = base.weight
    if isinstance(weight, Params4bit):
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(weight, Int8Params):
        values = weight.data * (base.state.SCB if weight.SCB is None else weight.SCB)[:, None] / 127
    elif hasattr(weight, "get_original_weight"):
        values = weight.get_original_weight()
    else:
        values = weight if type(weight) is nn.Parameter else weight.dequantize()
    linear = nn.Linear(IN, OUT).double()
    linear.load_state_dict({"weight": values.double(), "bias": base.bias.double()})
    exact = twin(model)
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
