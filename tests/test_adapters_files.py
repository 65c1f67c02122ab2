"""Files of models with bottleneck adapters: written whole, checked whole, bit for bit back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fastlora
from fastlora.anatomy.names import adapted_modules
from tests.adapter_models import CASES, PLACED, Case, adapted, place, randomize_bottlenecks
from tests.lora_models import mlp, randomize_adapters, same_bits, tiny_vit, trained

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BLOCK = "encoder.layers.encoder_layer_0"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"layer_norm": "pre", "scale": 0.3, "bias": False, "activation": "silu", "dropout": 0.25},
    "learned": {"layer_norm": "post", "scale": "learned", "reduction_factor": 2, "adapter_size": None},
    "whole": {"modules_to_save": ["heads"]},
}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def stacked(model: nn.Module, **settings: Any) -> nn.Module:
    fastlora.apply_lora(model, rank=2, alpha=6, target_modules=["self_attention", "mlp.0"], rslora=True)
    return randomize_adapters(adapted(model, **settings))


def check_same(loaded: nn.Module, model: nn.Module) -> None:
    assert repr(loaded) == repr(model)
    assert all(same_bits(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert trainable(loaded) == trainable(model)
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize(("case", "placement"), PLACED)
def test_round_trip_into_the_frozen_model(tmp_path: Path, case: Case, placement: Any) -> None:
    base = case.make().eval()
    model = adapted(copy.deepcopy(base), placement=placement)
    assert fastlora.save_adapter(model, tmp_path) == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS]
    loaded = fastlora.load_adapter(base, tmp_path)
    assert loaded is base
    check_same(loaded, model)
    assert torch.equal(case.run(loaded), case.run(model))


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("make", [adapted, stacked], ids=["alone", "with-lora"])
def test_round_trip_with_every_option(tmp_path: Path, settings: dict[str, Any], make: Any) -> None:
    case, base = CASES["torchvision"], tiny_vit().eval()
    model = make(copy.deepcopy(base), **settings)
    with torch.no_grad():
        model.get_parameter("heads.head.bias").add_(1.0 if "modules_to_save" in settings else 0.0)
    fastlora.save_adapter(model, tmp_path)
    loaded = fastlora.load_adapter(base, tmp_path)
    check_same(loaded, model)
    assert torch.equal(case.run(loaded), case.run(model))
    # into a model that has its layers, with other values
    other = make(copy.deepcopy(loaded) and tiny_vit().eval(), **settings)
    frozen = {name: value for name, value in model.state_dict().items() if name not in trainable(model)}
    other.load_state_dict(frozen, strict=False)
    randomize_bottlenecks(randomize_adapters(other, seed=5), seed=6)
    if settings.get("scale") == 0.3:
        for module in adapted_modules(other).values():
            module.adapter.scale, module.adapter.dropout = 7.0, 0.5
    fastlora.load_adapter(other, tmp_path)
    assert torch.equal(case.run(other), case.run(model))


def test_the_config_says_everything(tmp_path: Path) -> None:
    fastlora.save_adapter(stacked(tiny_vit(), placement="pfeiffer", modules_to_save=["head"]), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    lora = config.pop("lora")
    assert (lora["peft_type"], lora["r"], lora["modules_to_save"]) == ("LORA", 2, None)
    assert f"{BLOCK}.mlp.0" in lora["target_modules"]
    settings = {
        "activation": "gelu",
        "adapter_size": 3,
        "bias": True,
        "dropout": 0.0,
        "hidden_size": 8,
        "layer_norm": None,
        "placement": "sequential",
        "scale": 1.0,
    }
    assert config == {
        "format": "fastlora",
        "format_version": 1,
        "bottleneck": {"layers": {f"encoder.layers.encoder_layer_{i}.mlp": settings for i in range(2)}},
        "prompts": None,
        "modules_to_save": ["heads.head"],
    }
    keys = safetensors.torch.load_file(tmp_path / TENSORS).keys()
    block = f"base_model.model.{BLOCK}."
    assert {key.removeprefix(block) for key in keys if key.startswith(f"{block}mlp")} == {
        *(f"mlp.0.lora_{part}.weight" for part in "AB"),
        *(f"mlp.adapter.{linear}_proj.{part}" for linear in ("down", "up") for part in ("weight", "bias")),
    }
    assert {key for key in keys if "heads" in key} == {
        "base_model.model.heads.head.weight",
        "base_model.model.heads.head.bias",
    }


def test_lora_alone_keeps_pefts_format(tmp_path: Path) -> None:
    model = trained(tiny_vit())
    fastlora.save_adapter(model, tmp_path / "before")
    fastlora.apply_adapters(model)
    fastlora.save_adapter(model, tmp_path / "both")
    fastlora.remove_adapters(model)
    again = trained(model)
    fastlora.save_adapter(again, tmp_path / "after")
    before, both, after = (
        json.loads((tmp_path / n / CONFIG).read_text()) for n in ("before", "both", "after")
    )
    assert before == after
    assert before["peft_type"] == "LORA"
    # modules that train whole belong to no kind of adapter
    assert both["lora"] | {"modules_to_save": both["modules_to_save"]} == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_beside_16_bit_weights_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    case, base = CASES["torchvision"], tiny_vit().to(dtype).eval()
    model = adapted(copy.deepcopy(base), adapter_dtype=dtype, scale=0.7)
    fastlora.save_adapter(model, tmp_path)
    loaded = fastlora.load_adapter(base, tmp_path)
    assert place(loaded, f"{BLOCK}.mlp").adapter.up_proj.weight.dtype == dtype
    images = case.inputs()[0].to(dtype)
    assert torch.equal(case.run(loaded, images), case.run(model, images))


def test_modules_inside_a_tuned_one_are_refused(tmp_path: Path) -> None:
    model = adapted(tiny_vit())
    model.get_parameter("encoder.pos_embedding").requires_grad_(True)
    with pytest.raises(ValueError, match=r"adapters or prompts, got 'encoder\.pos_embedding'"):
        fastlora.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_module_that_trains_at_an_adapters_own_place(tmp_path: Path) -> None:
    base = mlp().eval()
    model = adapted(copy.deepcopy(base), target_modules=["head"])
    head = place(model, "head").original_module
    assert isinstance(head, nn.Linear)
    head.requires_grad_(True)
    nn.init.ones_(head.weight)
    fastlora.save_adapter(model, tmp_path)
    check_same(fastlora.load_adapter(base, tmp_path), model)


def test_an_adapter_that_the_model_was_built_with_is_a_module_like_others(tmp_path: Path) -> None:
    base = nn.Sequential(
        nn.Linear(4, 4), fastlora.AdapterLayer(4, 2, scale="learned"), nn.Linear(4, 2)
    ).eval()
    model = randomize_bottlenecks(randomize_adapters(fastlora.apply_lora(copy.deepcopy(base), rank=1)))
    fastlora.save_adapter(model, tmp_path)
    loaded = fastlora.load_adapter(base, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))
