"""Prompts beside LoRA layers and bottleneck adapters in one model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.inject.adapters import apply_adapters
from fastlora.inject.prompts import apply_prompts, remove_prompts
from fastlora.nn import AdapterLayer, LoRAModule
from tests.lora_models import randomize_adapters, same_bits, tiny_vit
from tests.prompt_models import IMAGES, TOKENS, prompts_of


@torch.no_grad()
def run(model: Any) -> Tensor:
    # without gradients, because nn.MultiheadAttention computes otherwise where a weight may train
    out: Tensor = model(IMAGES)
    return out


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def with_lora(model: nn.Module) -> nn.Module:
    return fastlora.apply_lora(model, target_modules=["self_attention", "mlp.0"], rank=2)


def with_adapters(model: nn.Module) -> nn.Module:
    return apply_adapters(model, adapter_size=2)


def with_prompts(model: nn.Module) -> nn.Module:
    return apply_prompts(model, num_tokens=TOKENS, deep=True)


@pytest.mark.parametrize(
    "order", [(with_lora, with_prompts), (with_prompts, with_lora)], ids=["lora", "prompts"]
)
def test_lora_and_prompts_train_together_whichever_came_first(
    order: tuple[Callable[[nn.Module], nn.Module], ...],
) -> None:
    model: Any = tiny_vit()
    plain = copy.deepcopy(model).eval()
    for add in order:
        model = add(model)
    names = trainable(model)
    assert "prompts.tokens" in names
    assert {name.rpartition(".")[2] for name in names} == {"tokens", "lora_A", "lora_B"}
    assert len(names) == 1 + 2 * 3 * 2
    randomize_adapters(model)
    model(IMAGES).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert same_bits(run(fastlora.remove_adapters(remove_prompts(model)).eval()), run(plain))


@pytest.mark.parametrize("first", ["adapters", "prompts"])
def test_adapters_and_prompts_train_together_whichever_came_first(first: str) -> None:
    model: Any = tiny_vit()
    expected = run(copy.deepcopy(model).eval())
    for add in (with_adapters, with_prompts) if first == "adapters" else (with_prompts, with_adapters):
        model = add(model)
    adapters = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    assert adapters
    for parameter in (p for adapter in adapters for p in adapter.parameters()):
        nn.init.normal_(parameter)
    ours = {id(p) for module in (*adapters, prompts_of(model)) for p in module.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == ours
    model(IMAGES).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert same_bits(run(fastlora.remove_adapters(remove_prompts(model)).eval()), expected)


def test_a_head_that_trained_beside_lora_trains_on() -> None:
    model = fastlora.apply_lora(tiny_vit(), target_modules=["mlp.0"], modules_to_save=["head"], rank=2)
    before = trainable(model)
    assert trainable(apply_prompts(model)) == before | {"prompts.tokens"}


@pytest.mark.parametrize(
    ("first", "second", "remove", "again"),
    [
        (apply_prompts, with_lora, fastlora.remove_adapters, with_lora),
        (apply_prompts, with_adapters, fastlora.remove_adapters, with_lora),
        (fastlora.apply_lora, with_prompts, remove_prompts, with_prompts),
        (apply_adapters, with_prompts, remove_prompts, with_prompts),
    ],
    ids=["lora", "adapters", "prompts-from-lora", "prompts-from-adapters"],
)
def test_removing_one_kind_spares_what_trains_beside_another(
    first: Callable[..., nn.Module], second: Any, remove: Any, again: Any
) -> None:
    model = second(first(tiny_vit(), modules_to_save=["head"]))
    remove(model)
    assert {"heads.head.weight", "heads.head.bias"} < trainable(again(model))
    # once nothing is left, the next choice is a fresh one
    fastlora.remove_adapters(remove_prompts(model))
    assert not {"heads.head.weight", "heads.head.bias"} & trainable(again(model))


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_stay_at_blocks_that_are_adapted_and_freed(placement: Any, deep: bool) -> None:
    def adapt(model: Any) -> Any:
        blocks = ["encoder_layer_0", "encoder_layer_1"]
        apply_adapters(model, adapter_size=2, target_modules=blocks, placement=placement, hidden_size=8)
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                nn.init.constant_(parameter, 0.1)
        return model

    def prompt(model: Any) -> Any:
        apply_prompts(model, num_tokens=TOKENS, deep=deep)
        nn.init.constant_(prompts_of(model).tokens, 0.3)
        return model

    plain = tiny_vit().eval()
    first, last = adapt(prompt(copy.deepcopy(plain))), prompt(adapt(copy.deepcopy(plain)))
    assert same_bits(run(first), run(last))
    expected = run(prompt(copy.deepcopy(plain)))
    for model in (first, last):
        assert same_bits(run(fastlora.remove_adapters(model)), expected)
        assert same_bits(run(remove_prompts(model)), run(plain))


def test_removing_lora_leaves_the_prompts() -> None:
    model: Any = with_prompts(tiny_vit()).eval()
    expected = run(model)
    with_lora(model)
    randomize_adapters(model)
    assert not torch.allclose(run(model), expected)
    fastlora.remove_adapters(model)
    torch.testing.assert_close(run(model), expected)
    assert not any(isinstance(module, LoRAModule) for module in model.modules())
