"""Requests that apply_lora and its counterparts refuse, and that they change nothing then."""

from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRALinear
from fastlora.nn import LoRAModule
from tests.lora_models import Snapshot, mlp, tiny_vit


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoRAModule)]


def bad_models() -> dict[str, tuple[nn.Module, dict[str, Any], type[Exception], str]]:
    quantised = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantised[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    on_meta = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    convolution = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(4, 4))
    odd_attention = nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2, kdim=4), "out": nn.Linear(8, 8)})
    adapted_already = fastlora.apply_lora(mlp(), target_modules=["head"], rank=2)
    return {
        "typo": (
            mlp(),
            {"target_modules": ["haed"]},
            ValueError,
            "got 'haed', which matches none; did you mean 'head'",
        ),
        "typo-vit": (
            tiny_vit(),
            {"target_modules": ["self_attn"]},
            ValueError,
            "did you mean 'self_attention'",
        ),
        "one-of-two": (
            mlp(),
            {"target_modules": ["head", "q_proj"]},
            ValueError,
            "got 'q_proj'.*names here end in '0'",
        ),
        "pattern": (mlp(), {"target_modules": "hea"}, ValueError, r"give a list, \['hea'\]"),
        "no-pattern": (
            mlp(),
            {"target_modules": "(head"},
            ValueError,
            "expected target_modules to be a regular expr",
        ),
        "exclude-typo": (
            mlp(),
            {"exclude_modules": ["haed"]},
            ValueError,
            "expected exclude_modules to name.*'head'",
        ),
        "whole-typo": (
            mlp(),
            {"modules_to_save": ["haed"]},
            ValueError,
            "expected modules_to_save to name.*'head'",
        ),
        "whole-string": (
            mlp(),
            {"modules_to_save": "head"},
            TypeError,
            "expected modules_to_save to be a list",
        ),
        "empty": (
            mlp(),
            {"target_modules": []},
            ValueError,
            "expected at least one module to adapt.*'0', '2', 'head'",
        ),
        "number": (mlp(), {"target_modules": 3}, TypeError, "expected target_modules to be a list of names"),
        "numbers": (
            mlp(),
            {"target_modules": [0, 2]},
            TypeError,
            "expected target_modules to be a list of names",
        ),
        "all-excluded": (
            mlp(),
            {"exclude_modules": r".*"},
            ValueError,
            "expected at least one module to adapt",
        ),
        "no-linear": (
            nn.Sequential(nn.ReLU()),
            {},
            ValueError,
            "this model has no linear or attention layer",
        ),
        "convolution": (
            convolution,
            {"target_modules": ["0", "1"]},
            TypeError,
            "0: expected an nn.Linear, got Conv1d",
        ),
        "container": (nn.Sequential(mlp()), {"target_modules": ["0"]}, TypeError, "got Sequential"),
        "quantised": (quantised, {}, TypeError, "1: expected Linear.weight to be float16.*got torch.int8"),
        "meta": (on_meta, {}, TypeError, "1: expected Linear.weight to hold values, got a meta tensor"),
        "odd-attention": (odd_attention, {}, TypeError, "mix: .*kdim or vdim unlike embed_dim"),
        "adapted": (
            adapted_already,
            {"target_modules": ["0"]},
            ValueError,
            "adapted at 1 places, 'head' first",
        ),
        "root-linear": (nn.Linear(4, 4), {}, ValueError, r"use fastlora.LoRALinear.from_linear\(layer\)"),
        "root-attention": (
            nn.MultiheadAttention(4, 2),
            {},
            ValueError,
            "LoRAMultiheadAttention.from_attention",
        ),
        "rank": (mlp(), {"rank": 0}, ValueError, "expected rank >= 1, got 0"),
        "rank-float": (mlp(), {"rank": 1.5}, TypeError, "expected rank to be an integer, got 1.5"),
        "dropout": (mlp(), {"dropout": 1.5}, ValueError, r"expected dropout in \[0, 1\], got 1.5"),
    }


@pytest.mark.parametrize("case", bad_models().keys())
def test_bad_requests_change_nothing(case: str) -> None:
    model, arguments, error, match = bad_models()[case]
    before = Snapshot(model) if case != "meta" else None
    with pytest.raises(error, match=match):
        fastlora.apply_lora(model, **arguments)
    if before is not None:
        before.assert_unchanged()
    assert case == "adapted" or not adapted(model)


def test_not_a_model() -> None:
    for given in (torch.zeros(3), "model", None):
        with pytest.raises(TypeError, match=r"expected an nn\.Module, got"):
            fastlora.apply_lora(given)  # type: ignore[type-var]


def test_a_peft_model_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT, an optional package")
    model = peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["head"], r=2))
    with pytest.raises(ValueError, match=r"expected a model without LoRA.*unload"):
        fastlora.apply_lora(model)


@pytest.mark.parametrize(
    "operation", [fastlora.merge_adapters, fastlora.unmerge_adapters, fastlora.remove_adapters]
)
def test_a_model_without_adapters_is_an_error(operation: Any) -> None:
    with pytest.raises(ValueError, match="expected a model with LoRA layers, got Sequential without any"):
        operation(mlp())


def test_a_bare_layer_cannot_be_removed_in_place() -> None:
    with pytest.raises(ValueError, match=r"got a bare LoRALinear; use its \.to_base\(\)"):
        fastlora.remove_adapters(LoRALinear(4, 4, rank=2))
