"""The comparison of ways to fine-tune: parameters by independent arithmetic, models by their structure."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torchvision.models import VisionTransformer

from fastlora import create_transfer_model
from fastlora.anatomy.stages import head as find_head
from fastlora.anatomy.stages import stages
from fastlora.transfer.costs import CostSettings, StrategyCost, compare, counting, measure
from fastlora.transfer.costs.rows import ROWS, find_row
from fastlora.transfer.costs.usual import sentences, verdicts
from fastlora.transfer.models.weightless import LLAMA_7B, ModelSpec, build
from fastlora.transfer.strategies import STRATEGIES

SETTINGS = CostSettings()
VIT_HEAD = 768 * 1000 + 1000
VIT = 86_567_656


def table(spec: ModelSpec, *rows: str) -> dict[str, StrategyCost]:
    return {cost.strategy: cost for cost in compare(spec, SETTINGS, rows or None)}


def counted(spec: ModelSpec, *rows: str) -> dict[str, StrategyCost]:
    """The same without a pass, which is what takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "sample_input", lambda *given: None)
        return table(spec, *rows)


def trainable(costs: Mapping[str, StrategyCost]) -> dict[str, int]:
    return {name: cost.report.trainable_parameters for name, cost in costs.items() if cost.report is not None}


@pytest.fixture(scope="module")
def vit() -> dict[str, StrategyCost]:
    return counted(ModelSpec("vit_b_16"))


def test_vit_b_16_by_hand(vit: dict[str, StrategyCost]) -> None:
    wide, mlp, blocks, rank = 768, 3072, 12, 16
    block = 4 * wide * wide + 4 * wide + 2 * wide * mlp + mlp + wide + 4 * wide
    packed = rank * wide + 3 * wide * rank
    square, up = 2 * rank * wide, rank * (wide + mlp)
    adapter = 2 * wide * 64 + 64 + wide
    assert trainable(vit) == {
        "full": VIT,
        # the final norm is unfrozen with the last block
        "fine_tuning": block + 2 * wide + VIT_HEAD,
        "lora": blocks * (packed + square + 2 * up) + VIT_HEAD,
        "lora_attention": blocks * (packed + square) + VIT_HEAD,
        "adapter": blocks * 2 * adapter + VIT_HEAD,
        "prompt_shallow": 10 * wide + VIT_HEAD,
        "prompt": blocks * 10 * wide + VIT_HEAD,
        "feature_extraction": VIT_HEAD,
    }


def test_vit_b_16_percentages(vit: dict[str, StrategyCost]) -> None:
    added = {name: cost.added_percent for name, cost in vit.items() if cost.added_percent is not None}
    assert added == {
        "lora": pytest.approx(100 * 2_359_296 / (VIT + 2_359_296)),
        "lora_attention": pytest.approx(100 * 884_736 / (VIT + 884_736)),
        "adapter": pytest.approx(100 * 2_379_264 / (VIT + 2_379_264)),
        "prompt_shallow": pytest.approx(100 * 7_680 / (VIT + 7_680)),
        "prompt": pytest.approx(100 * 92_160 / (VIT + 92_160)),
    }
    assert {v["strategy"]: v["holds"] for v in verdicts(list(vit.values()))} == {
        "lora": False,
        "lora_attention": False,
        "adapter": True,
        "prompt_shallow": True,
        "prompt": False,
    }
    full = vit["full"].report
    assert full is not None
    assert full.trainable_percent == 100.0


def test_kept_activations_of_a_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, tokens, wide, batch = 4, 16 * 16 + 1, 256, 2
    monkeypatch.setattr(
        counting, "build", lambda spec: VisionTransformer(32, 2, blocks, 2, wide, 1024).train()
    )
    rows = ("full", "fine_tuning", "lora", "prompt_shallow", "feature_extraction")
    costs = table(ModelSpec("vit_b_16", batch_size=batch), *rows)
    kept = {name: cost.report.kept_bytes or 0 for name, cost in costs.items() if cost.report is not None}
    # the probe keeps what the class token is a slice of; the last block about its part of everything
    assert kept["feature_extraction"] == batch * tokens * wide * 4
    assert 1 / (blocks + 1) < kept["fine_tuning"] / kept["full"] < 1 / (blocks - 1)
    # a frozen LayerNorm and a frozen linear layer keep less than a trained one
    assert kept["prompt_shallow"] < kept["lora"] <= kept["full"]


def test_resnet_50() -> None:
    costs = counted(ModelSpec("resnet50"))
    head = 2048 * 1000 + 1000
    # a bottleneck block: inputs and outputs of its three convolutions, and of the shortcut of the first
    stack = {64: (64, 3), 128: (256, 4), 256: (512, 6), 512: (1024, 3)}
    lora = 16 * (3 * 7 * 7 + 64)
    for narrow, (inputs, count) in stack.items():
        wide = 4 * narrow
        rest = (count - 1) * (wide + narrow) + count * (9 * narrow + narrow + narrow + wide)
        lora += 16 * (inputs + narrow + inputs + wide + rest)
    assert trainable(costs) == {
        "full": 25_557_032,
        "fine_tuning": 14_964_736 + head,
        "lora": lora + head,
        "feature_extraction": head,
    }
    assert costs["lora"].note == ""
    assert costs["lora"].adapts_body
    refused = ("lora_attention", "adapter", "prompt_shallow", "prompt")
    assert all(costs[name].note.startswith("not possible") for name in refused)
    assert [verdict["strategy"] for verdict in verdicts(list(costs.values()))] == ["lora"]


def test_llama_7b() -> None:
    pytest.importorskip("transformers", reason="LLaMA's shape comes from transformers")
    rows = ("full", "fine_tuning", "lora_attention", "prompt_shallow", "prompt", "feature_extraction")
    costs = counted(ModelSpec(LLAMA_7B), *rows)
    head = 32000 * 4096
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert trainable(costs) == {
        "full": 6_738_415_616,
        "fine_tuning": block + 4096 + head,
        "lora_attention": 32 * 2 * 16 * (4096 + 4096),
        "prompt_shallow": 10 * 4096,
        "feature_extraction": head,
    }
    assert {v["strategy"]: v["holds"] for v in verdicts(list(costs.values()))} == {
        "lora_attention": True,
        "prompt_shallow": False,
    }
    full = costs["full"].report
    assert full is not None
    # bfloat16 weights, gradients and moments
    assert full.weight_bytes + full.gradient_bytes == 4 * 6_738_415_616
    assert full.optimizer_bytes == 4 * 6_738_415_616 + 4 * (32 * 9 + 3)
    assert costs["prompt"].report is None


def test_timm_names() -> None:
    pytest.importorskip("timm", reason="the model is timm's")
    spec = ModelSpec("timm:vit_tiny_patch16_224", batch_size=1, num_classes=5)
    costs = counted(spec, "fine_tuning", "lora_attention", "feature_extraction")
    assert costs["fine_tuning"].note == "trains blocks.11 and head"
    assert trainable(costs)["lora_attention"] == 12 * 16 * (192 + 3 * 192) + 192 * 5 + 5
    assert "packs q, k and v" in costs["lora_attention"].note
    assert costs["feature_extraction"].report is not None


@pytest.mark.parametrize(
    ("name", "weights", "strategies"),
    [
        ("resnet18", None, list(STRATEGIES)),
        ("dinov2_vits14", "DEFAULT", ["adapter", "prompt"]),
        ("efficientnet_lite0", "DEFAULT", ["lora", "adapter"]),
        ("googlenet", None, ["full"]),
    ],
    ids=["resnet18", "dinov2", "efficientnet", "googlenet"],
)
def test_what_is_counted_is_what_would_be_trained(
    name: str, weights: str | None, strategies: list[str]
) -> None:
    rows = [strategy for strategy in strategies if strategy in ROWS]
    found = trainable(counted(ModelSpec(name, num_classes=3), *rows))
    made = {}
    for strategy in rows:
        try:
            model = create_transfer_model(name, 3, strategy, weights=weights)
        except (ValueError, TypeError):
            continue
        made[strategy] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == made
    assert made


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
    found, layer = find_head(model)
    last = stages(model, layer)[-1]
    assert (found, last.name) == (head, stage)
    assert model.get_submodule(stage) in last.modules


def test_what_a_model_can_not_have_is_said() -> None:
    costs = counted(ModelSpec("alexnet", batch_size=1), "lora_attention", "feature_extraction")
    assert costs["lora_attention"].report is None
    assert costs["lora_attention"].note.startswith("not possible: expected attention, got AlexNet")
    assert trainable(costs) == {"feature_extraction": 4096 * 1000 + 1000}


def test_lora_that_is_never_called_is_told() -> None:
    """torchvision's Swin reads the weights of ``qkv`` and calls no layer."""
    costs = table(ModelSpec("swin_t", batch_size=1), "lora_attention")
    note = costs["lora_attention"].note
    told = "never called and train nothing, features.1.0.attn.qkv first" in note
    # apply_lora may as well refuse
    assert told or (costs["lora_attention"].report is None and "qkv" in note), note


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match=r"expected a strategy out of full, fine_tuning, .*got 'everything'"):
        find_row("everything")
    with pytest.raises(ValueError, match="did you mean 'feature_extraction'"):
        table(ModelSpec("resnet18"), "feature_extracton")


def test_sentences() -> None:
    def verdict(percent: float, holds: bool) -> dict[str, Any]:
        title = f"LoRA {percent}"
        return dict(method="LoRA", quoted="about 0.1 %", title=title, percent=percent, holds=holds)

    assert sentences([]) == []
    assert sentences([verdict(0.12, True), verdict(2.5, False)]) == [
        "LoRA, usually about 0.1 %: holds for 0.12 % (LoRA 0.12); not for 2.50 % (LoRA 2.5)."
    ]


def test_every_strategy_has_a_record_without_objects() -> None:
    cost = StrategyCost("lora", "LoRA", True, None, note="not possible: because")
    assert cost.as_json()["report"] is None
    assert set(cost.as_json()) >= {field.name for field in dataclasses.fields(cost)} - {"adds", "measured"}
    assert list(ROWS) == [row.name for row in ROWS.values()]


@pytest.mark.full
def test_measured_peak_covers_the_computed_sum_and_a_step_takes_time() -> None:
    """A network of a few megabytes: what is measured can't be less than what is held at the same time."""
    spec = ModelSpec("squeezenet1_1", batch_size=1)
    cost = table(spec, "full")["full"]
    assert cost.report is not None
    report = cost.report
    found = measure.measured(spec, "full", SETTINGS, expected_bytes=0, device="cpu")
    # gradients come while kept activations go, so these two need not be held together
    held = report.training_bytes - report.gradient_bytes
    assert 0.9 * held < found.peak_bytes < 2 * report.training_bytes + 64 * 2**20
    assert found.step_seconds > 0


def test_measuring_says_why_it_can_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec("resnet18", batch_size=1)
    with pytest.raises(measure.Unmeasured, match="needs about 1,048,576 TiB"):
        measure.measured(spec, "full", SETTINGS, expected_bytes=2**60, device="cpu")
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'Traceback:\nValueError: expected more' >&2\nexit 3\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(measure.Unmeasured, match="exit code 3: ValueError: expected more"):
        measure.measured(spec, "full", SETTINGS, expected_bytes=0, device="cpu")
