"""Adapter files: written whole or not at all, checked before anything changes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fastlora
from fastlora import LoRALayer, LoRALinear
from fastlora.nn import LoRAModule
from tests.lora_models import mlp, randomize_adapters, same_bits, tiny_vit, trained

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rslora": True},
        {"modules_to_save": ["heads"]},
        {"target_modules": ["self_attention"]},
        {"rank": 5},
    ],
    ids=str,
)
def test_round_trip_into_the_frozen_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = tiny_vit()
    model = trained(copy.deepcopy(base), dropout=0.25, **settings)
    with torch.no_grad():
        model.get_parameter("heads.head.bias").add_(1.0 if "modules_to_save" in settings else 0.0)
    assert fastlora.save_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    assert sorted(contents(tmp_path / "adapter")) == [CONFIG, TENSORS]
    loaded = fastlora.load_adapter(base.eval(), tmp_path / "adapter")
    assert loaded is base
    assert repr(loaded) == repr(model)
    assert all(same_bits(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    assert not any(module.training for module in loaded.modules())


def test_round_trip_into_an_adapted_model(tmp_path: Path) -> None:
    model = trained(mlp(), alpha=6, rslora=True, dropout=0.5)
    fastlora.save_adapter(model, tmp_path)
    other = fastlora.apply_lora(mlp(), rank=2, alpha=1)
    other.load_state_dict({n: v for n, v in model.state_dict().items() if "lora_" not in n}, strict=False)
    fastlora.merge_adapters(other)
    fastlora.load_adapter(other.eval(), tmp_path)
    x = torch.randn(3, 12)
    assert torch.equal(other(x), model(x))
    layer = other.get_submodule("head")
    assert isinstance(layer, LoRAModule)
    # alpha and rslora decide what the file means; dropout is the model's own affair
    assert (layer.alpha, layer.rslora, layer.lora_dropout, layer.merged) == (6.0, True, 0.0, False)


def test_layers_with_settings_of_their_own(tmp_path: Path) -> None:
    base = nn.ModuleDict(
        {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "block": nn.ModuleDict({"a": nn.Linear(6, 6)})}
    )
    model = copy.deepcopy(base)
    model["a"] = LoRALinear.from_linear(nn.Linear(6, 6), rank=3, alpha=5)
    model["b"] = LoRALayer(nn.Linear(6, 6), rank=2, alpha=7.5)
    block = model["block"]
    assert isinstance(block, nn.ModuleDict)
    block["a"] = LoRALinear.from_linear(nn.Linear(6, 6), rank=2, alpha=7.5)
    model.requires_grad_(False)
    randomize_adapters(model)
    fastlora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 7.5)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"^a": 3}, {"^a": 5})
    loaded = fastlora.load_adapter(base, tmp_path)
    for name in ("a", "b", "block.a"):
        mine, theirs = (m.get_submodule(name) for m in (loaded, model))
        assert isinstance(mine, LoRALinear)
        assert isinstance(theirs, LoRAModule)
        assert same_bits(mine.lora_B, theirs.lora_B)
        assert mine.scaling == theirs.scaling


def test_the_config_says_what_peft_needs(tmp_path: Path) -> None:
    fastlora.save_adapter(trained(tiny_vit(), modules_to_save=["head"], dropout=0.1), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    targets = [
        f"encoder.layers.encoder_layer_{i}.{n}"
        for i in range(2)
        for n in ("self_attention", "mlp.0", "mlp.3")
    ]
    assert sorted(config.pop("target_modules")) == sorted(targets)
    assert config == {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": 2,
        "lora_alpha": 2,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": ["heads.head"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "task_type": None,
    }
    prefix = "base_model.model.encoder.layers.encoder_layer_1."
    keys = safetensors.torch.load_file(tmp_path / TENSORS).keys()
    assert {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} == {
        f"{name}.lora_{part}.weight"
        for name in ("self_attention", "self_attention.base_layer.out_proj", "mlp.0", "mlp.3")
        for part in "AB"
    }
    assert {key for key in keys if "heads" in key} == {
        f"base_model.model.heads.head.{p}" for p in ("weight", "bias")
    }


def test_a_merged_model_saves_the_same_files(tmp_path: Path) -> None:
    model = trained(tiny_vit())
    fastlora.save_adapter(model, tmp_path / "unmerged")
    fastlora.save_adapter(fastlora.merge_adapters(model), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "unmerged")


def test_wrapped_models_save_plain_names(tmp_path: Path) -> None:
    model = trained(mlp())
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    fastlora.save_adapter(model, tmp_path / "plain")
    fastlora.save_adapter(wrapped, tmp_path / "wrapped")
    assert contents(tmp_path / "plain") == contents(tmp_path / "wrapped")
    fresh = torch.compile(mlp(), backend="eager")
    assert isinstance(fresh, nn.Module)
    fastlora.load_adapter(fresh, tmp_path / "plain")
    assert same_bits(fresh.get_parameter("_orig_mod.head.lora_B"), model.get_parameter("head.lora_B"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_beside_16_bit_weights_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    for adapter_dtype in (dtype, torch.float32):
        model = trained(mlp(dtype), adapter_dtype=adapter_dtype)
        fastlora.save_adapter(model, tmp_path)
        loaded = fastlora.load_adapter(mlp(dtype), tmp_path)
        assert same_bits(loaded.get_parameter("head.lora_A"), model.get_parameter("head.lora_A"))


def test_batch_norm_beside_the_adapter_keeps_its_statistics(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    base = copy.deepcopy(model)
    fastlora.apply_lora(model, rank=2, modules_to_save=["1"])
    model(torch.randn(8, 6) * 3)
    fastlora.save_adapter(model, tmp_path)
    loaded = fastlora.load_adapter(base, tmp_path)
    assert all(same_bits(loaded.state_dict()[f"1.{n}"], v) for n, v in model[1].state_dict().items())
    assert loaded.state_dict()["1.num_batches_tracked"] == 1
