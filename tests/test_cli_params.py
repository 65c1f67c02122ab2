"""``fastlora params``: what it prints and how it ends. The numbers themselves are tested elsewhere."""

import json

import pytest
from torchvision.models import VisionTransformer
from typer.testing import CliRunner, Result

from fastlora.cli import app
from fastlora.transfer.costs import Measured, counting, measure
from fastlora.transfer.costs.rows import ROWS

WIDE = {"COLUMNS": "200"}


def run(*arguments: str) -> Result:
    return CliRunner(env=WIDE).invoke(app, ["params", *arguments])


def test_json_is_all_there_is_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, wide, head = 2, 32, 33 * 1000
    monkeypatch.setattr(counting, "build", lambda spec: VisionTransformer(32, 4, blocks, 2, wide, 64).train())
    result = run(
        "vit_b_16", "--rank", "8", "--adapter-size", "32", "--num-tokens", "5", "--batch-size", "1", "--json"
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["settings"] == {"rank": 8, "adapter_size": 32, "prompts": 5, "weight": None}
    assert record["model"] == {
        "name": "vit_b_16",
        "num_classes": None,
        "dtype": "float32",
        "batch_size": 1,
        "sequence_length": 512,
    }
    strategies = {entry["strategy"]: entry for entry in record["strategies"]}
    assert list(strategies) == list(ROWS)
    lora = strategies["lora"]["report"]
    assert lora["trainable_parameters"] - head == blocks * 8 * (4 * 32 + 2 * 32 + 2 * (32 + 64))
    assert strategies["adapter"]["report"]["trainable_parameters"] - head == blocks * 2 * (65 * 32 + 32)
    assert strategies["prompt_shallow"]["report"]["trainable_parameters"] - head == 5 * wide
    assert sum(row["kept_bytes"] for row in lora["modules"]) == lora["kept_bytes"]
    assert {verdict["strategy"] for verdict in record["usual_percentages"]} == {
        "lora",
        "lora_attention",
        "adapter",
        "prompt_shallow",
        "prompt",
    }


def test_table() -> None:
    result = run("resnet18", "--batch-size", "2", "--num-classes", "10", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "resnet18 in bfloat16, 2 images of 3 x 224 x 224" in result.stdout
    full = next(line for line in result.stdout.splitlines() if "Full fine-tuning" in line)
    # 11,176,512 parameters without a head, two bytes each
    assert full.split()[:8] == ["Full", "fine-tuning", "11,181,642", "100", "-", "21.3", "21.3", "42.7"]
    # convolutions carry it, beside a head of 5,130
    lora = next(line for line in result.stdout.splitlines() if "LoRA r=16, all layers" in line)
    assert int(lora.split()[4].replace(",", "")) > 100_000
    assert "Adapters, 64 wide: not possible: expected transformer blocks" in result.stdout
    assert "Measured" not in result.stdout
    assert result.stderr.strip() == "" or "counting" in result.stderr


def test_details_list_the_modules_of_one_strategy() -> None:
    result = run("resnet18", "--batch-size", "1", "--details", "feature_extraction")
    assert result.exit_code == 0, result.output
    assert "Linear probe\nModule" in result.stdout
    assert "513,000 of 11,689,512 parameters train (4.39 %)" in result.stdout


def test_measured_peaks_stand_beside_the_computed_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(spec: object, row: str, settings: object, *, expected_bytes: int) -> Measured:
        if row == "lora":
            raise measure.Unmeasured("the process ended with exit code -9: no message")
        return Measured(3 * 2**20, 0.25)

    monkeypatch.setattr(measure, "measured", found)
    # what is kept isn't looked at here
    monkeypatch.setattr(counting, "sample_input", lambda *given: None)
    result = run("resnet18", "--batch-size", "1", "--measure")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert next(line for line in lines if "Strategy" in line).split()[-2:] == ["Measured", "s/step"]
    assert next(line for line in lines if "Full fine-tuning" in line).split()[-2:] == ["3.0", "0.25"]
    assert next(line for line in lines if "LoRA r=16, all layers" in line).split()[-2:] == ["-", "-"]
    assert "training a few steps: Full fine-tuning" in result.stderr
    assert "exit code -9" in result.stderr
    record = json.loads(run("resnet18", "--batch-size", "1", "--measure", "--json").stdout)
    measured = {entry["strategy"]: entry["measured_bytes"] for entry in record["strategies"]}
    assert measured["full"] == 3 * 2**20
    assert measured["lora"] is None
    assert measured["adapter"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_b16"], "did you mean 'vit_b_16'"),
        (["resnet18", "--details", "everything"], "expected a strategy out of full"),
        (["llama-7b", "--num-classes", "3"], "expected no --num-classes for llama-7b"),
        (["resnet18", "--rank", "0"], "--rank"),
        (["resnet18", "--dtype", "int8"], "'int8' is not one of"),
    ],
    ids=["model", "details", "classes", "rank", "dtype"],
)
def test_bad_input_ends_with_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_missing_library_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    result = run("timm:resnet50")
    assert result.exit_code == 1
    assert "error: the model timm:resnet50 needs the package timm" in result.stderr


def test_help_has_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "fastlora params vit_b_16" in result.stdout


@pytest.mark.parametrize(
    ("weight", "per_matrix"), [("nf4", 64 * 32 // 2 + 32 + 4 + 1092), ("int8", 2048 + 4 * 48)]
)
def test_frozen_linear_layers_may_be_quantised(
    weight: str, per_matrix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, transposed to each other; the head and what trains stay as they are."""

    def build(spec: object, **options: object) -> VisionTransformer:
        return VisionTransformer(32, 4, 1, 2, 32, 64).train()

    monkeypatch.setattr(counting, "build", build)
    found = []
    for options in ([], ["--weight", weight]):
        result = run("vit_b_16", "--batch-size", "1", "--json", *options)
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["strategies"]
        found.append({row["strategy"]: row["report"]["weight_bytes"] for row in rows if row["report"]})
    dense, quantised = found
    saved = 2 * (4 * 64 * 32 - per_matrix)
    assert quantised["full"] == dense["full"]
    assert quantised["adapter"] == dense["adapter"] - saved
    assert quantised["feature_extraction"] == dense["feature_extraction"] - saved


def test_quantised_weights_are_not_measured() -> None:
    result = run("vit_b_16", "--weight", "nf4", "--measure")
    assert result.exit_code != 0
    assert "--measure with --weight dense, got nf4" in result.output
