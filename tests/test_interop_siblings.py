"""Layers of accelerated PEFT models that share x: what only PEFT's have."""

from typing import Any

import peft
import pytest
from torch import Tensor, nn

from tests import sibling_models
from tests.sibling_models import (
    Attention,
    Between,
    apart,
    assert_as_apart,
    assert_counts,
    assert_none_share,
    attention,
    family,
    groups,
    run,
    step,
)


def test_ranks_factors_dropout_and_what_trains_may_differ() -> None:
    module = attention(rank_pattern={"k": 2}, alpha_pattern={"v": 32}, lora_bias=True)
    module.q.lora_A["default"].weight.requires_grad_(False)
    module.k.lora_dropout["default"] = nn.Dropout(0.5)
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == [3]


def _disabled(module: Any, x: Tensor) -> Tensor:
    module.k.enable_adapters(False)
    return x


def _inner_hook(module: Any, x: Tensor) -> Tensor:
    module.k.lora_A["default"].register_forward_hook(lambda layer, inputs, out: out * 2)
    return x


@pytest.mark.parametrize("change", [_disabled, _inner_hook])
def test_what_changes_between_two_calls_counts(change: Between) -> None:
    assert_counts(change)


def test_another_adapter_and_a_deleted_one() -> None:
    model = sibling_models.way.adapt(nn.Sequential(Attention()))
    module = model.base_model.model[0]
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=False))
    for names, together in ((["other"], []), (["default"], [3]), (["default", "other"], [3])):
        model.base_model.set_adapter(names)
        for _ in range(2):
            with apart():
                expected = run(module)
            with groups() as seen:
                assert_as_apart(run(module), expected)
        assert seen == together
    model.delete_adapter("other")
    model.base_model.set_adapter("default")
    with apart():
        expected = run(module)
    assert_as_apart(run(module), expected)


def _switched_off(module: Any) -> None:
    module.k.enable_adapters(False)


def test_nothing_is_shared_with_a_layer_that_is_switched_off() -> None:
    assert_none_share(_switched_off)


def test_gate_and_up_of_an_mlp_are_read_as_they_are() -> None:
    model, batch = family("Llama")
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.gate_proj.enable_adapters(False)
    mlp.up_proj.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))
    with apart():
        expected = step(model, batch)
    assert_as_apart(step(model, batch), expected)
    mlp.gate_proj.enable_adapters(True)
    with apart():
        expected = step(model, batch)
    with groups() as seen:
        assert_as_apart(step(model, batch), expected)
    assert seen == [3, 2]
