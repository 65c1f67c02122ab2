"""LoRA and bottleneck adapters in one model, in both orders."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import AdapterLayer, LoRALayer, LoRALinear
from fastlora.anatomy.all_linear import classifier_heads
from fastlora.anatomy.names import adapted_modules, lora_layers
from fastlora.nn import LoRAModule
from tests.adapter_models import CASES, Case, place, randomize_bottlenecks
from tests.lora_models import mlp, randomize_adapters, same_bits, tiny_vit

MODELS = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
ORDERS = pytest.mark.parametrize("lora_first", [True, False], ids=["lora-first", "adapters-first"])


def lora(case: Case, model: nn.Module) -> nn.Module:
    # torchvision's Swin attention reads the weights of these layers and never calls them
    unused = r".*\.(qkv|proj)" if case is CASES["swin"] else None
    return fastlora.apply_lora(model, rank=2, alpha=2, exclude_modules=unused)


def stacked(case: Case, model: nn.Module, lora_first: bool) -> nn.Module:
    operations: list[Any] = [
        lambda: lora(case, model),
        lambda: fastlora.apply_adapters(model, adapter_size=3),
    ]
    for operation in operations if lora_first else operations[::-1]:
        operation()
    return randomize_bottlenecks(randomize_adapters(model)).eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def head(model: nn.Module) -> set[str]:
    """What "all-linear" trains whole."""
    heads = classifier_heads(model)
    return {f"{name}.{own}" for name, module in heads.items() for own, _ in module.named_parameters()}


@MODELS
@ORDERS
def test_everything_of_both_kinds_trains(case: Case, lora_first: bool) -> None:
    model = stacked(case, case.make(), lora_first)
    expected = {name for name, _ in model.named_parameters() if "lora_" in name or ".adapter." in name}
    assert trainable(model) == expected | head(model)
    # no LoRA within an adapter, and the same layers as without adapters
    assert list(lora_layers(model)) == list(lora_layers(lora(case, case.make())))
    assert set(adapted_modules(model)) == set(case.places("houlsby"))
    out = case.run(model)
    torch.autograd.backward((out * torch.randn_like(out)).sum())
    idle = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not (p.grad is not None and p.grad.any())
    }
    # a head that the first output does not pass through
    assert all(name.startswith("pooler") for name in idle)


@MODELS
def test_both_orders_compute_the_same(case: Case) -> None:
    base = case.make()
    models = [stacked(case, copy.deepcopy(base), lora_first) for lora_first in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(case.run(models[0]), case.run(models[1]))


@MODELS
@ORDERS
def test_merging_folds_lora_alone_and_removing_takes_both(case: Case, lora_first: bool) -> None:
    base = case.make().eval()
    values = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    kinds = {name: type(module) for name, module in base.named_modules()}
    model = stacked(case, base, lora_first)
    before = case.run(model)
    fastlora.merge_adapters(model)
    torch.testing.assert_close(case.run(model), before, rtol=1e-3, atol=1e-4)
    assert "(merged)" in str(fastlora.adapter_summary(model))
    fastlora.unmerge_adapters(model)
    assert torch.equal(case.run(model), before)
    fastlora.remove_adapters(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(same_bits(model.state_dict()[name], value) for name, value in values.items())
    assert trainable(model) == head(model)
    assert fastlora.apply_lora(model, rank=2) is model


def test_the_summary_describes_both() -> None:
    summary = fastlora.adapter_summary(stacked(CASES["torchvision"], tiny_vit(), True))
    assert str(summary).startswith(
        "LoRA rank 2 on 4 LoRALinear + 2 LoRAMultiheadAttention and 4 bottleneck adapters of size 3; "
    )


@ORDERS
def test_a_head_that_trains_goes_on_training(lora_first: bool) -> None:
    model = tiny_vit()
    if lora_first:
        fastlora.apply_lora(model, rank=2, modules_to_save=["head"])
        fastlora.apply_adapters(model)
    else:
        fastlora.apply_adapters(model, modules_to_save=["head"])
        fastlora.apply_lora(model, rank=2, exclude_modules=["head"])
    assert {"heads.head.weight", "heads.head.bias"} < trainable(model)
    assert fastlora.adapter_summary(model).also_trainable == ("heads.head",)


def test_lora_inside_an_adapted_module_by_name() -> None:
    model = fastlora.apply_adapters(tiny_vit(), placement="pfeiffer")
    fastlora.apply_lora(model, target_modules=["mlp.0", "mlp.3"], rank=2)
    assert sorted(lora_layers(model)) == [
        f"encoder.layers.encoder_layer_{i}.mlp.{j}" for i in range(2) for j in (0, 3)
    ]
    with pytest.raises(ValueError, match="matches none"):
        fastlora.apply_lora(fastlora.apply_adapters(tiny_vit()), target_modules=["down_proj"])


@pytest.mark.parametrize("kind", [LoRALinear, LoRALayer])
def test_an_adapter_around_a_lora_layer(kind: Any) -> None:
    linear = nn.Linear(4, 5)
    model = nn.Sequential(kind(linear, rank=2) if kind is LoRALayer else kind.from_linear(linear, rank=2))
    randomize_bottlenecks(randomize_adapters(fastlora.apply_adapters(model, target_modules=["0"])))
    module = place(model, "0")
    assert isinstance(module.original_module, LoRAModule)
    assert module.adapter.hidden_size == 5
    x = torch.randn(3, 4)
    expected: Tensor = module.adapter(module.original_module(x))
    assert torch.equal(model(x), expected)
    fastlora.remove_adapters(model)
    assert type(model[0]) is nn.Linear
    assert same_bits(model[0].weight, linear.weight)


def test_adapters_that_a_model_was_built_with_stay_trainable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), AdapterLayer(4, 2), nn.Linear(4, 2))
    fastlora.apply_lora(model, rank=1)
    assert trainable(model) == {
        *(f"1.{name}" for name in AdapterLayer(4, 2).adapter_params()),
        *(f"{i}.lora_{part}" for i in (0, 2) for part in "AB"),
    }


def test_the_fused_encoder_comes_back_after_both() -> None:
    model = CASES["torch"].make()
    stacked(CASES["torch"], model, True)
    fastlora.remove_adapters(model)
    assert [layer.activation_relu_or_gelu for layer in model.get_submodule("layers").children()] == [1, 1]


def test_the_fused_encoder_stays_off_where_another_tuner_is_left() -> None:
    model = CASES["torch"].make()
    layers = model.get_submodule("layers")
    fastlora.apply_lora(model, target_modules=["linear1"], rank=2)
    layers.get_submodule("0").add_module("dropout", AdapterLayer(16, 2))
    fastlora.remove_adapters(model)
    assert [layer.activation_relu_or_gelu for layer in layers.children()] == [0, 1]


def test_an_unadapted_model_still_freezes_what_nobody_chose() -> None:
    model = mlp()
    fastlora.apply_adapters(model, target_modules=["head"])
    assert trainable(model) == {f"head.adapter.{n}" for n in place(model, "head").adapter.adapter_params()}
