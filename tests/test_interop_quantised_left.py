"""Quantised layers that are left to PEFT, or that bitsandbytes rewrites for inference."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import fastlora
from fastlora.interop._peft_fused import Fused
from tests.peft_twins import assert_equal_runs
from tests.quantised_twins import (
    inputs,
    lora_layer,
    peft_model,
    run,
)


def as_it_is(layer: Any) -> None:
    """Changes nothing."""


def forward_of_its_own(layer: Any) -> None:
    base = layer.base_layer
    base.forward = base.forward


def of_class(kind: type) -> Callable[[Any], object]:
    """Makes it the layer that PEFT has for another quantiser."""
    return lambda layer: setattr(layer, "__class__", kind)


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
    "gptq": ("nf4", {}, of_class(GPTQLoraLinear), ""),
    "awq": ("nf4", {}, of_class(AwqLoraLinear), ""),
    # PEFT defines it where the package hqq is installed
    "hqq": ("nf4", {}, of_class(type("HqqLoraLinear", (nn.Module, LoraLayer), {})), ""),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_not_known_is_left_and_told(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    base, settings, change, words = REASONS[reason]
    model = peft_model(base, torch.float32, **settings)
    change(lora_layer(model))
    kind = type(lora_layer(model))
    fastlora.accelerate(model)
    told = f"0 of 1 LoRA layers run fused; left to PEFT: 1 lora.{kind.__name__} {words}"
    assert caplog.messages[-1:] == [told.rstrip()]
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
