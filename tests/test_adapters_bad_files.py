"""Files with bottleneck adapters that are refused before anything changes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fastlora
from tests.adapter_models import adapted, place
from tests.lora_models import Snapshot, mlp, randomize_adapters, tiny_vit, trained

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BLOCK = "encoder.layers.encoder_layer_0"
KEY = f"base_model.model.{BLOCK}.mlp.adapter.down_proj.weight"


def stacked(model: nn.Module, **settings: Any) -> nn.Module:
    fastlora.apply_lora(model, rank=2, target_modules=["self_attention", "mlp.0"])
    return randomize_adapters(adapted(model, **settings))


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return edit


def edit_place(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda config: config["bottleneck"]["layers"][f"{BLOCK}.mlp"].update(changes))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / TENSORS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / TENSORS)

    return edit


def rename_place(config: dict[str, Any]) -> None:
    layers = config["bottleneck"]["layers"]
    layers["tail"] = layers.pop(f"{BLOCK}.mlp")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str | None]] = {
    "truncated": (lambda f: os.truncate(f / TENSORS, 300), "expected a safetensors file", None),
    "version": (
        edit_config(lambda c: c.update(format_version=2)),
        "'fastlora' of version 1, got .* 2; a new",
        None,
    ),
    "version-bool": (edit_config(lambda c: c.update(format_version=True)), "got .*version True", None),
    "format": (edit_config(lambda c: c.update(format="other")), "format 'fastlora'.*got 'other'", None),
    "no-version": (edit_config(lambda c: c.pop("format_version")), "got 'fastlora' of version None", None),
    "new-kind": (edit_config(lambda c: c.update(vectors={})), "got 'vectors' too; a newer", None),
    "prompts": (
        edit_config(lambda c: c.update(prompts={"tokens": 4})),
        "prompts: expected an object with 'modules', got ",
        None,
    ),
    "neither": (
        edit_config(lambda c: c.update(bottleneck=None, lora=None)),
        "expected LoRA layers, bottleneck adapters or prompts, got none",
        None,
    ),
    "section": (edit_config(lambda c: c.update(bottleneck=[1])), "an object with 'layers', got ", None),
    "layers": (
        edit_config(lambda c: c["bottleneck"].update(layers=3)),
        "an object with 'layers', got ",
        None,
    ),
    "place": (
        edit_config(lambda c: c["bottleneck"]["layers"].update({f"{BLOCK}.mlp": 3})),
        "exactly the fields of an adapter, got 3",
        None,
    ),
    "extra-setting": (edit_place(magic=1), r"unknown: \['magic'\]", None),
    "placement": (edit_place(placement="beside"), "expected placement of .* got 'beside'", None),
    "size-text": (edit_place(adapter_size="3"), "expected adapter_size to be an integer, got '3'", None),
    "size-null": (edit_place(adapter_size=None), "expected adapter_size to be an integer, got None", None),
    "size-zero": (edit_place(adapter_size=0), "expected adapter_size >= 1, got 0", None),
    "hidden-bool": (edit_place(hidden_size=True), "expected hidden_size to be an integer, got True", None),
    "scale-nan": (edit_place(scale=float("nan")), "scale to be finite, got nan", None),
    "activation": (edit_place(activation="tanh"), "'gelu', 'relu', 'silu', got 'tanh'", None),
    "whole-text": (edit_config(lambda c: c.update(modules_to_save="head")), "to be a list of names", None),
    "lora": (
        edit_config(lambda c: c["lora"].update(use_magic=True)),
        "lora: expected plain LoRA, got use_m",
        None,
    ),
    "dora": (
        edit_config(lambda c: c["lora"].update(use_dora=True)),
        "expected a layer that can carry DoRA, got nn.MultiheadAttention",
        "expected dora=False as in the model, got True",
    ),
    "lora-gone": (
        edit_config(lambda c: c.update(lora=None)),
        "lora_A.weight: nothing in the model takes it",
        "LoRA in the model, none in the file",
    ),
    "other-size": (
        edit_place(adapter_size=4),
        r"mlp.adapter.down_proj.weight: expected \[4, 8\], got \[3, 8\]",
        "expected adapter_size 3 as in the model, got 4",
    ),
    "other-hidden": (edit_place(hidden_size=9), "expected hidden_size 8 as in the model, got 9", None),
    "other-placement": (
        edit_place(placement="nowhere"),
        "got 'nowhere'",
        None,
    ),
    "learned": (
        edit_place(scale="learned"),
        "mlp.adapter.scale: missing",
        "expected scale 'fixed' as in the model, got 'learned'",
    ),
    "norm": (
        edit_place(layer_norm="pre"),
        "mlp.adapter.norm.weight: missing",
        "expected layer_norm None as in the model, got 'pre'",
    ),
    "no-bias": (
        edit_place(bias=False),
        "mlp.adapter.up_proj.bias: nothing in the model takes it",
        "expected bias True as in the model, got False",
    ),
    "no-such-place": (
        edit_config(rename_place),
        "tail: no module of this name in the model",
        "tail: no adapter at this place in the model",
    ),
    "missing": (edit_tensors(lambda t: t.pop(KEY)), f"differences: 1.*{KEY}: missing", None),
    "unexpected": (
        edit_tensors(lambda t: t.update(extra=torch.zeros(1))),
        "extra: nothing in the model",
        None,
    ),
    "shape": (edit_tensors(lambda t: t.update({KEY: torch.zeros(3, 9)})), r"\[3, 8\], got \[3, 9\]", None),
    "integers": (
        edit_tensors(lambda t: t.update({KEY: t[KEY].int()})),
        "floating dtype, got torch.int32",
        None,
    ),
}


@pytest.mark.parametrize("ready", [False, True], ids=["frozen", "adapted"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_file_changes_nothing(tmp_path: Path, case: str, ready: bool) -> None:
    damage, match, seen_by_adapted = DAMAGE[case]
    fastlora.save_adapter(stacked(tiny_vit()), tmp_path)
    damage(tmp_path)
    model = stacked(tiny_vit(), scale=2.0) if ready else tiny_vit()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=f"(?s){seen_by_adapted or match if ready else match}"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()


def test_another_kind_than_the_models(tmp_path: Path) -> None:
    fastlora.save_adapter(trained(tiny_vit()), tmp_path / "lora")
    fastlora.save_adapter(adapted(tiny_vit()), tmp_path / "adapters")
    cases = [
        (adapted(tiny_vit()), "lora", "an adapter in the model, none in the file"),
        (trained(tiny_vit()), "adapters", "LoRA in the model, none in the file"),
        (adapted(tiny_vit(), placement="pfeiffer"), "adapters", "no adapter at this place in the model"),
        (mlp(), "adapters", "no module of this name in the model"),
    ]
    for model, name, match in cases:
        before = Snapshot(model)
        with pytest.raises(ValueError, match=f"(?s){match}"):
            fastlora.load_adapter(model, tmp_path / name)
        before.assert_unchanged()
    with pytest.raises(ValueError, match="got a bare AdaptedModule"):
        fastlora.save_adapter(place(adapted(mlp(), target_modules=["head"]), "head"), tmp_path)
