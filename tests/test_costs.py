"""The comparison of ways to fine-tune: parameters by independent arithmetic, models by their structure."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from fastlora.anatomy import attention as anatomy
from fastlora.anatomy.stages import head as find_head
from fastlora.transfer.costs import measure
from fastlora.transfer.costs.counting import (
    STRATEGIES,
    StrategyCost,
    TuningSettings,
    apply_strategy,
    check_strategy,
    compare,
)
from fastlora.transfer.costs.usual import Verdict, sentences, verdicts
from fastlora.transfer.models.weightless import LLAMA_7B, ModelSpec, build, describe_input, sample_input

SETTINGS = TuningSettings()
VIT_HEAD = 768 * 1000 + 1000
VIT = 86_567_656


def table(spec: ModelSpec, *strategies: str) -> dict[str, StrategyCost]:
    return {cost.strategy: cost for cost in compare(spec, SETTINGS, strategies or None)}


def trainable(costs: Mapping[str, StrategyCost]) -> dict[str, int]:
    return {name: cost.report.trainable_parameters for name, cost in costs.items() if cost.report is not None}


@pytest.fixture(scope="module")
def vit() -> dict[str, StrategyCost]:
    return table(ModelSpec("vit_b_16", batch_size=2))


def test_vit_b_16_by_hand(vit: dict[str, StrategyCost]) -> None:
    wide, mlp, blocks, rank = 768, 3072, 12, 16
    block = 4 * wide * wide + 4 * wide + 2 * wide * mlp + mlp + wide + 4 * wide
    packed = rank * wide + 3 * wide * rank
    square, up = 2 * rank * wide, rank * (wide + mlp)
    adapter = 2 * wide * 64 + 64 + wide
    assert trainable(vit) == {
        "full": VIT,
        # the final norm is unfrozen with the last block
        "last_layers": block + 2 * wide + VIT_HEAD,
        "lora": blocks * (packed + square + 2 * up) + VIT_HEAD,
        "lora_attention": blocks * (packed + square) + VIT_HEAD,
        "adapters": blocks * 2 * adapter + VIT_HEAD,
        "prompts": 10 * wide + VIT_HEAD,
        "deep_prompts": blocks * 10 * wide + VIT_HEAD,
        "linear_probe": VIT_HEAD,
    }


def test_vit_b_16_percentages(vit: dict[str, StrategyCost]) -> None:
    added = {name: cost.added_percent for name, cost in vit.items() if cost.added_percent is not None}
    assert added == {
        "lora": pytest.approx(100 * 2_359_296 / (VIT + 2_359_296)),
        "lora_attention": pytest.approx(100 * 884_736 / (VIT + 884_736)),
        "adapters": pytest.approx(100 * 2_379_264 / (VIT + 2_379_264)),
        "prompts": pytest.approx(100 * 7_680 / (VIT + 7_680)),
        "deep_prompts": pytest.approx(100 * 92_160 / (VIT + 92_160)),
    }
    assert {v.strategy: v.holds for v in verdicts(list(vit.values()))} == {
        "lora": False,
        "lora_attention": False,
        "adapters": True,
        "prompts": True,
        "deep_prompts": False,
    }
    full = vit["full"].report
    assert full is not None
    assert full.trainable_percent == 100.0


def test_vit_b_16_kept_activations(vit: dict[str, StrategyCost]) -> None:
    kept = {name: cost.report.kept_bytes for name, cost in vit.items() if cost.report is not None}
    tokens = 2 * 197 * 768 * 4
    # the probe keeps what the class token is a slice of; the last block one thirteenth or so of everything
    assert kept["linear_probe"] == tokens
    assert kept["full"] is not None
    assert kept["last_layers"] is not None
    assert 1 / 14 < kept["last_layers"] / kept["full"] < 1 / 10
    # a frozen LayerNorm and a frozen linear layer keep less than a trained one
    assert kept["prompts"] is not None
    assert kept["lora"] is not None
    assert kept["prompts"] < kept["lora"] <= kept["full"]


def test_resnet_50() -> None:
    costs = table(ModelSpec("resnet50", batch_size=2))
    head = 2048 * 1000 + 1000
    assert trainable(costs) == {
        "full": 25_557_032,
        "last_layers": 14_964_736 + head,
        "lora": 16 * (2048 + 1000),
        "linear_probe": head,
    }
    assert costs["lora"].note == "fc is the only linear layer; convolutions can't carry LoRA yet"
    assert not costs["lora"].adapts_body
    assert all(costs[name].note.startswith("not possible") for name in ("adapters", "prompts"))
    # LoRA on the head alone proves nothing about LoRA
    assert verdicts(list(costs.values())) == []


def test_llama_7b() -> None:
    pytest.importorskip("transformers", reason="LLaMA's shape comes from transformers")
    spec = ModelSpec(LLAMA_7B, batch_size=1, sequence_length=8)
    costs = table(spec, "full", "last_layers", "lora_attention", "prompts", "deep_prompts", "linear_probe")
    head = 32000 * 4096
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert trainable(costs) == {
        "full": 6_738_415_616,
        "last_layers": block + 4096 + head,
        "lora_attention": 32 * 2 * 16 * (4096 + 4096),
        "prompts": 10 * 4096,
        "linear_probe": head,
    }
    assert {v.strategy: v.holds for v in verdicts(list(costs.values()))} == {
        "lora_attention": True,
        "prompts": False,
    }
    full = costs["full"].report
    assert full is not None
    # bfloat16 weights, gradients and moments
    assert full.weight_bytes + full.gradient_bytes == 4 * 6_738_415_616
    assert full.optimizer_bytes == 4 * 6_738_415_616 + 4 * (32 * 9 + 3)
    assert costs["deep_prompts"].report is None


def test_timm_names() -> None:
    pytest.importorskip("timm", reason="the model is timm's")
    spec = ModelSpec("timm:vit_tiny_patch16_224", batch_size=1, num_classes=5)
    costs = table(spec, "last_layers", "lora_attention", "linear_probe")
    assert costs["last_layers"].note == "trains blocks.11 and head"
    assert trainable(costs)["lora_attention"] == 12 * 16 * (192 + 3 * 192) + 192 * 5 + 5
    assert "packs q, k and v" in costs["lora_attention"].note
    assert costs["linear_probe"].report is not None


@pytest.mark.parametrize(
    ("name", "head", "stage"),
    [
        ("vit_b_16", "heads.head", "encoder.layers.encoder_layer_11"),
        ("resnet18", "fc", "layer4"),
        ("convnext_tiny", "classifier.2", "features.7"),
        ("swin_t", "head", "features.7"),
        ("maxvit_t", "classifier.5", "blocks.3"),
        ("regnet_x_400mf", "fc", "trunk_output.block4"),
    ],
)
def test_head_and_last_stage(name: str, head: str, stage: str) -> None:
    model = build(ModelSpec(name))
    assert find_head(model)[0] == head
    found, module = anatomy.last_stage(model)
    assert found == stage
    assert model.get_submodule(stage) in module.children()


class _OnlyHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)


def test_a_model_without_head_or_stages() -> None:
    with pytest.raises(ValueError, match="expected a head called heads, head"):
        find_head(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="expected layers before the head"):
        anatomy.last_stage(_OnlyHead())
    with pytest.raises(ValueError, match="expected attention"):
        anatomy.attention_targets(build(ModelSpec("resnet18")), 16)
    costs = table(ModelSpec("alexnet", batch_size=1), "lora_attention", "linear_probe")
    assert costs["lora_attention"].report is None
    assert trainable(costs) == {"linear_probe": 4096 * 1000 + 1000}


def test_lora_that_is_never_called_is_told() -> None:
    """torchvision's Swin reads the weights of ``qkv`` and calls no layer."""
    costs = table(ModelSpec("swin_t", batch_size=1), "full", "lora_attention")
    assert costs["full"].note == ""
    note = costs["lora_attention"].note
    told = "never called and train nothing, features.1.0.attn.qkv first" in note
    # apply_lora may as well refuse
    assert told or (costs["lora_attention"].report is None and "qkv" in note), note


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
        ({"name": "vit_b16"}, r"got 'vit_b16'; did you mean 'vit_b_16'"),
        ({"name": "llama7b"}, "did you mean 'llama-7b'"),
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


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match="expected a strategy, one of full, last_layers"):
        check_strategy("everything")
    spec = ModelSpec("resnet18")
    with pytest.raises(ValueError, match="got 'everything'"):
        apply_strategy("everything", build(spec), spec, SETTINGS)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    spec = ModelSpec(LLAMA_7B)
    with pytest.raises(
        ImportError, match=r"llama-7b needs the package transformers.*fastlora-triton\[peft\]"
    ):
        build(spec)


def test_sentences() -> None:
    def verdict(percent: float, holds: bool) -> Verdict:
        return Verdict("LoRA", "about 0.1 %", "lora", f"LoRA {percent}", percent, holds)

    assert sentences([]) == []
    assert sentences([verdict(0.12, True), verdict(2.5, False)]) == [
        "LoRA, usually about 0.1 %: holds for 0.12 % (LoRA 0.12); not for 2.50 % (LoRA 2.5)."
    ]


def test_every_strategy_has_a_record_without_objects() -> None:
    cost = StrategyCost("lora", "LoRA", True, None, note="not possible: because")
    assert cost.as_json()["report"] is None
    assert set(cost.as_json()) >= {field.name for field in dataclasses.fields(cost)} - {"adds", "measured"}
    assert list(STRATEGIES) == [strategy.name for strategy in STRATEGIES.values()]


def test_measured_peak_covers_the_computed_sum_and_a_step_takes_time() -> None:
    """A network of a few megabytes: what is measured can't be less than what is held at the same time."""
    spec = ModelSpec("shufflenet_v2_x0_5", batch_size=16)
    cost = table(spec, "full")["full"]
    assert cost.report is not None
    report = cost.report
    found = measure.measured(spec, "full", SETTINGS, expected_bytes=0, device="cpu")
    # gradients come while kept activations go, so these two need not be held together
    held = report.training_bytes - report.gradient_bytes
    assert 0.9 * held < found.peak_bytes < 2 * report.training_bytes + 64 * 2**20
    assert found.step_seconds > 0


def test_measuring_says_why_it_can_not() -> None:
    spec = ModelSpec("resnet18", batch_size=1)
    with pytest.raises(measure.Unmeasured, match="needs about 1,048,576 TiB"):
        measure.measured(spec, "full", SETTINGS, expected_bytes=2**60, device="cpu")
    with pytest.raises(measure.Unmeasured, match="exit code 1: ValueError: expected a strategy"):
        measure.measured(spec, "everything", SETTINGS, expected_bytes=0, device="cpu")
