"""Requests that apply_adapters refuses, and that they change nothing then."""

from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdapterLayer
from fastlora.nn import AdaptedModule
from tests.adapter_models import adapted, timm_vit, torch_encoder
from tests.lora_models import Snapshot, mlp, tiny_vit, trained


class Unknown(nn.Module):
    """Does not say how wide its output is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def with_adapter_child() -> nn.Module:
    part = nn.Linear(4, 4)
    part.add_module("adapter", nn.Linear(4, 4))
    return nn.Sequential(part)


def image_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(1, 4))


def no_norm() -> nn.Module:
    return nn.ModuleDict({"attn": Unknown(), "mlp": Unknown()})


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no-blocks": (mlp, {}, ValueError, "got Sequential with none that we know; say where.*target_modules"),
    "style": (
        tiny_vit,
        {"placement": "adapterhub"},
        ValueError,
        "placement without target_modules to be 'houlsby', 'pfeiffer', 'parallel'",
    ),
    "style-of-names": (
        tiny_vit,
        {"placement": "sequential"},
        ValueError,
        "without target_modules to be 'houlsby', 'pfeiffer', 'parallel', got 'sequential'",
    ),
    "style-of-blocks": (
        mlp,
        {"target_modules": ["head"], "placement": "houlsby"},
        ValueError,
        "with target_modules to be 'sequential', 'parallel', got 'houlsby'",
    ),
    "torch-parallel": (
        torch_encoder,
        {"placement": "parallel"},
        ValueError,
        "'houlsby' or 'pfeiffer' for torch's",
    ),
    "typo": (
        mlp,
        {"target_modules": ["haed"]},
        ValueError,
        "'haed', which matches none; did you mean 'head'",
    ),
    "exclude-typo": (tiny_vit, {"exclude_modules": ["mlpp"]}, ValueError, "exclude_modules to name.*'mlp'"),
    "whole-typo": (tiny_vit, {"modules_to_save": ["haed"]}, ValueError, "modules_to_save to name.*'head'"),
    "whole-string": (tiny_vit, {"modules_to_save": "head"}, TypeError, "modules_to_save to be a list"),
    "all-excluded": (tiny_vit, {"exclude_modules": ["encoder"]}, ValueError, "got none: .*leave out all 4"),
    "numbers": (mlp, {"target_modules": [0]}, TypeError, "expected target_modules to be a list of names"),
    "unknown-width": (
        lambda: nn.Sequential(Unknown()),
        {"target_modules": ["0"]},
        ValueError,
        "(?s)got 1 others.*0: Unknown does not say how wide its output is; give hidden_size",
    ),
    "other-width": (
        mlp,
        {"target_modules": ["head", "1"], "hidden_size": 4},
        ValueError,
        "(?s)got 1 others.*head: its output is 3 wide, not hidden_size=4",
    ),
    "convolution": (image_model, {"target_modules": ["0", "1", "2"]}, ValueError, "(?s)got 3 others.*Conv2d"),
    "list": (
        lambda: nn.Sequential(nn.ModuleList([nn.Linear(4, 4)])),
        {"target_modules": ["0"], "hidden_size": 4},
        ValueError,
        "expected a module that is called, got ModuleList",
    ),
    "own-adapter": (with_adapter_child, {"target_modules": ["0"]}, ValueError, "without an 'adapter' of its"),
    "out-proj": (tiny_vit, {"target_modules": ["out_proj"]}, ValueError, "got '.*out_proj' alone"),
    "adapted": (lambda: adapted(tiny_vit()), {}, ValueError, "without bottleneck adapters, got 4"),
    "size": (tiny_vit, {"adapter_size": 0}, ValueError, "expected adapter_size >= 1, got 0"),
    "factor": (tiny_vit, {"reduction_factor": 9}, ValueError, "reduction_factor <= hidden_size, got 9 for 8"),
    "hidden": (tiny_vit, {"hidden_size": 8.0}, TypeError, "expected hidden_size to be an integer, got 8.0"),
    "hidden-unlike-block": (tiny_vit, {"hidden_size": 9}, ValueError, "8 wide, not hidden_size=9"),
    "no-norm": (lambda: nn.Sequential(no_norm()), {}, ValueError, "(?s)got 2 others.*0.attn: Unknown does"),
    "dtype": (tiny_vit, {"adapter_dtype": torch.int8}, TypeError, "expected adapter_dtype to be float16"),
    "activation": (tiny_vit, {"activation": "tanh"}, ValueError, "'gelu', 'relu', 'silu', got 'tanh'"),
    "whole-lora": (
        lambda: trained(timm_vit(), target_modules=["head"]),
        {"modules_to_save": ["head"]},
        ValueError,
        "modules_to_save without LoRA layers, got one with 'head' in it",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_requests_change_nothing(
    make: Any, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = make()
    before = Snapshot(model)
    with pytest.raises(error, match=match):
        fastlora.apply_adapters(model, **arguments)
    before.assert_unchanged()


def test_not_a_model() -> None:
    for given in (torch.zeros(3), "model", None):
        with pytest.raises(TypeError, match=r"expected an nn\.Module, got"):
            fastlora.apply_adapters(given)  # type: ignore[type-var]


def test_a_wrong_width_shows_at_the_first_call() -> None:
    model = nn.Sequential(Unknown())
    fastlora.apply_adapters(model, target_modules=["0"], hidden_size=4)
    with pytest.raises(ValueError, match=r"expected h \[\.\.\., 4\], got \(2, 5\); hidden_size must be"):
        model(torch.zeros(2, 5))


def test_adapters_cannot_be_merged() -> None:
    model = adapted(tiny_vit())
    before = Snapshot(model)
    for operation in (fastlora.merge_adapters, fastlora.unmerge_adapters):
        with pytest.raises(ValueError, match="expected LoRA layers, got bottleneck adapters alone"):
            operation(model)
    before.assert_unchanged()


def test_a_bare_adapted_module() -> None:
    module = AdaptedModule(nn.Linear(4, 4), AdapterLayer(4, 2), "sequential")
    with pytest.raises(ValueError, match=r"got a bare AdaptedModule; use its \.original_module"):
        fastlora.remove_adapters(module)
    with pytest.raises(ValueError, match="without bottleneck adapters, got 1, 'the model itself' first"):
        fastlora.apply_adapters(module)
    placement: Any = "beside"
    with pytest.raises(ValueError, match="expected placement to be one of"):
        AdaptedModule(nn.Linear(4, 4), AdapterLayer(4, 2), placement)
