"""A PEFT model twice, as it is and accelerated, and comparisons of the two."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastlora
from fastlora.interop._peft_fused import Fused
from fastlora.together.mlp import unfuse

IN, OUT = 32, 12


def peft_model(*, dtype: torch.dtype = torch.float32, autocast_adapters: bool = True, **settings: Any) -> Any:
    """One LoRA layer at ``base_model.model[0]`` whose update is not zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"], **settings})
    return awake(get_peft_model(net, config, autocast_adapter_dtype=autocast_adapters))


def awake(model: Any) -> Any:
    """Fills every A and B, of which one starts at zero."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            values = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values.to(parameter.dtype))
    return model


def with_adapters(model: Any, *names: str, **settings: Any) -> Any:
    """Further adapters, all of them active at once."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 9, "target_modules": ["0"], **settings})
    for name in names:
        model.add_adapter(name, config)
    awake(model).base_model.set_adapter(["default", *names])
    return model


def twins(model: Any, *, change: Callable[[Any], object] | None = None) -> tuple[Any, Any]:
    """The model, and an accelerated copy; ``change`` then happens to both."""
    accelerated = fastlora.accelerate(copy.deepcopy(model))
    for each in (model, accelerated):
        if change is not None:
            change(each)
    return model, accelerated


def layer_of(model: Any) -> Any:
    """The one module that :func:`peft_model` or :func:`apart_and_fused` made a model of."""
    return model.base_model.model[0]


def is_fused(model: Any, x: Tensor) -> bool:
    """Whether a call of the one LoRA layer runs on the fused op."""
    layer = layer_of(model)
    return isinstance(layer, Fused) and layer._parts(x) is not None


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """``[3, 5, 32]``."""
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def run(model: Any, x: Tensor, *, seed: int = 1) -> dict[str, Tensor]:
    """Output and every gradient, x's too."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.double().square().sum().backward()
    found = {"output": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_equal_runs(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, exactly: bool = False
) -> None:
    """The same tensors, to rounding or bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        size = torch.nan_to_num(tensor).abs().max().item()
        rtol, atol = (0.0, 0.0) if exactly else (1e-4, 1e-5 * max(size, 1.0))
        # the gradient's name beside the difference
        pair = ({name: found[name]}, {name: tensor})
        torch.testing.assert_close(*pair, rtol=rtol, atol=atol, equal_nan=True)


def apart_and_fused(module: nn.Module, **given: Any) -> tuple[Any, Any]:
    """An accelerated model of one module whose MLP is apart, and its copy with the MLP fused.

    Args:
        module: An MLP, or a layer with one.
        **given: Of peft's LoraConfig, at least its ``target_modules``.
    """
    config = LoraConfig(**{"r": 4, "init_lora_weights": False} | given)
    plain: Any = get_peft_model(nn.Sequential(module), config).train()
    fused = fastlora.accelerate(copy.deepcopy(plain))
    fastlora.accelerate(plain)
    unfuse(layer_of(plain))
    return plain, fused
