"""Models without weights: shapes of real ones, and names, numbers and libraries that don't fit."""

import sys

import pytest
import torch

from fastlora.transfer.models.weightless import LLAMA_7B, ModelSpec, build, describe_input, sample_input


def test_weightless_models_have_the_shapes_of_real_ones() -> None:
    spec = ModelSpec("resnet18", num_classes=7, dtype="bfloat16", batch_size=2)
    light, real = build(spec), build(spec, weightless=False)
    shapes = [{n: (t.shape, t.dtype) for n, t in model.state_dict().items()} for model in (light, real)]
    assert shapes[0] == shapes[1]
    assert light.training
    assert sum(p.untyped_storage().nbytes() for p in light.parameters()) == 2 * len(list(light.parameters()))
    batch = sample_input(spec, real)
    assert isinstance(batch, torch.Tensor)
    assert (batch.shape, batch.dtype) == ((2, 3, 224, 224), torch.bfloat16)
    assert describe_input(spec, real) == "2 images of 3 x 224 x 224"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_b16"}, r"did you mean 'vit_b_16'.* llama-7b or timm:NAME, got 'vit_b16'"),
        ({"name": "llama7b"}, "did you mean 'llama-7b'"),
        ({"name": "dinov2_vits"}, "did you mean 'dinov2_vits14'"),
        ({"name": "timm:resnet5"}, "did you mean 'timm:resnet50'"),
        ({"name": "resnet18", "batch_size": 0}, "expected batch_size >= 1, got 0"),
        ({"name": "resnet18", "num_classes": 0}, "expected num_classes >= 1, got 0"),
        ({"name": "resnet18", "dtype": "int8"}, "expected dtype to be one of float32"),
        ({"name": LLAMA_7B, "num_classes": 2}, "expected no num_classes for llama-7b"),
    ],
)
def test_bad_specs(settings: dict[str, object], message: str) -> None:
    if str(settings["name"]).startswith("timm:"):
        pytest.importorskip("timm", reason="its names are timm's")
    with pytest.raises(ValueError, match=message):
        ModelSpec(**settings)  # type: ignore[arg-type]


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = ModelSpec(LLAMA_7B)
    with pytest.raises(
        ImportError, match=r"llama-7b needs the package transformers.*fastlora-triton\[peft\]"
    ):
        build(spec)
