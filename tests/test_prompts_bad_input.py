"""Requests that apply_prompts and remove_prompts refuse, and that they change nothing then."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fastlora.inject.prompts import apply_prompts, remove_prompts
from tests.lora_models import Snapshot, mlp, tiny_vit
from tests.prompt_models import text_model, vision_model


def taken() -> nn.Module:
    model: nn.Module = tiny_vit()
    model.add_module("prompts", nn.Linear(2, 2))
    return model


def shared_blocks() -> nn.Module:
    model = tiny_vit()
    model.encoder.layers[1] = model.encoder.layers[0]
    whole: nn.Module = model
    return whole


def swin() -> nn.Module:
    timm = pytest.importorskip("timm", reason="prompts a model of timm, an optional package")
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1)}
    return timm.models.SwinTransformer(**sizes, num_heads=(1, 1))  # type: ignore[no-any-return]


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "prompted": (lambda: apply_prompts(tiny_vit()), {}, ValueError, "got one with 'prompts'.*remove_prompts"),
    "prompted-inside": (
        lambda: nn.Sequential(apply_prompts(tiny_vit())),
        {},
        ValueError,
        r"got one with '0\.prompts'",
    ),
    "mlp": (mlp, {}, TypeError, "expected a VisionTransformer of torchvision.*got Sequential"),
    "resnet": (lambda: resnet18(num_classes=2), {}, TypeError, "got ResNet; use LoRA or adapters there"),
    "swin": (swin, {}, TypeError, "got SwinTransformer"),
    "bare-block": (lambda: tiny_vit().encoder.layers[0], {}, TypeError, "got EncoderBlock"),
    "two": (
        lambda: nn.ModuleDict({"left": tiny_vit(), "right": tiny_vit()}),
        {},
        ValueError,
        "expected one transformer that takes prompts, got 2: 'left', 'right'",
    ),
    "shared-blocks": (shared_blocks, {}, ValueError, "with blocks that differ, got 2 places for 1 of them"),
    "decoder-bert": (lambda: text_model("bert", is_decoder=True), {}, TypeError, "got BertModel"),
    "name-taken": (taken, {}, ValueError, "to have no attribute 'prompts', got one"),
    "no-token": (tiny_vit, {"num_tokens": 0}, ValueError, "expected num_tokens >= 1, got 0"),
    "negative": (tiny_vit, {"num_tokens": -3}, ValueError, "expected num_tokens >= 1, got -3"),
    "bool": (tiny_vit, {"num_tokens": True}, TypeError, "expected num_tokens to be an integer, got True"),
    "float": (tiny_vit, {"num_tokens": 5.0}, TypeError, r"expected num_tokens to be an integer, got 5\.0"),
    "deep": (tiny_vit, {"deep": 1}, TypeError, "expected deep to be True or False, got 1"),
    "dropout": (tiny_vit, {"dropout": 1.5}, ValueError, r"expected dropout in \[0, 1\], got 1\.5"),
    "negative-dropout": (tiny_vit, {"dropout": -0.1}, ValueError, r"expected dropout in \[0, 1\]"),
    "nan-dropout": (tiny_vit, {"dropout": float("nan")}, ValueError, r"expected dropout in \[0, 1\]"),
    "text-dropout": (tiny_vit, {"dropout": "0.1"}, TypeError, "expected dropout to be a number"),
    "init": (tiny_vit, {"init": "normal"}, ValueError, "expected init to be 'auto', 'uniform', 'vocabulary'"),
    "init-list": (tiny_vit, {"init": ["auto"]}, ValueError, "expected init to be 'auto'"),
    "no-vocabulary": (tiny_vit, {"init": "vocabulary"}, ValueError, "a vision transformer has no vocabulary"),
    "hf-no-vocabulary": (lambda: vision_model("hf"), {"init": "vocabulary"}, ValueError, "for ViTModel"),
    "deep-text": (
        lambda: text_model("bert"),
        {"deep": True},
        ValueError,
        "expected deep=False for BertModel",
    ),
    "few-words": (
        lambda: text_model("bert"),
        {"num_tokens": 30},
        ValueError,
        "expected num_tokens <= 29, the size of the vocabulary, got 30",
    ),
    "whole-typo": (tiny_vit, {"modules_to_save": ["haed"]}, ValueError, "modules_to_save to name.*'head'"),
    "whole-string": (tiny_vit, {"modules_to_save": "head"}, TypeError, "modules_to_save to be a list"),
    "whole-number": (tiny_vit, {"modules_to_save": 3}, TypeError, "expected modules_to_save to be a list"),
    "whole-text": (
        lambda: text_model("bert"),
        {"modules_to_save": ["classifier"]},
        ValueError,
        "got 'classifier', which matches none",
    ),
}


@pytest.mark.parametrize("case", BAD.keys())
def test_bad_requests_change_nothing(case: str) -> None:
    make, arguments, error, match = BAD[case]
    model = make()
    before = Snapshot(model)
    hooks = {name: list(m._forward_pre_hooks) + list(m._forward_hooks) for name, m in model.named_modules()}
    with pytest.raises(error, match=match):
        apply_prompts(model, **arguments)
    before.assert_unchanged()
    assert hooks == {
        name: list(m._forward_pre_hooks) + list(m._forward_hooks) for name, m in model.named_modules()
    }


def test_a_model_on_the_meta_device_is_refused() -> None:
    model = tiny_vit().to("meta")
    with pytest.raises(ValueError, match="to hold values, got meta tensors; load the model's weights"):
        apply_prompts(model)
    assert not hasattr(model, "prompts")


@pytest.mark.parametrize("given", [torch.zeros(3), "model", None], ids=["tensor", "string", "none"])
def test_not_a_model(given: Any) -> None:
    for operation in (apply_prompts, remove_prompts):
        with pytest.raises(TypeError, match=r"expected an nn\.Module, got"):
            operation(given)


def test_a_model_without_prompts_has_none_to_remove() -> None:
    model = tiny_vit()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="expected a model with prompts, got VisionTransformer without any"):
        remove_prompts(model)
    before.assert_unchanged()
