"""``fastlora finetune`` from end to end: what it writes, and that flags, files and resumption agree."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.transfer.data import open_images
from fastlora.transfer.finetune import load_run
from fastlora.transfer.finetune.predict import predict_files
from fastlora.transfer.recommend import recommend_strategy
from tests.cases import cases
from tests.finetune_models import CLASSES, write_pictures
from tests.finetune_runs import DINO, RESNET, SHORT, finetuned, invoke, report_of

LEARNING = [*RESNET, "--epochs", 8, "--batch-size", 8, "--strategy", "full", "--lr", 2e-4, "--head-factor", 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.mark.parametrize(
    ("strategy", "model", "written"),
    # the runs of the other tests here and of test_finetune_export train the others, too
    cases(
        [
            ("feature_extraction", RESNET, "model.safetensors"),
            ("lora", DINO, "adapter"),
        ],
        [
            ("gradual", RESNET, "model.safetensors"),
            ("fine_tuning", RESNET, "model.safetensors"),
            ("full", RESNET, "model.safetensors"),
            ("lp_ft", RESNET, "model.safetensors"),
            ("adapter", DINO, "adapter"),
            ("prompt", DINO, "adapter"),
        ],
    ),
)
def test_every_strategy_trains_saves_and_answers_alike(
    data: Path, tmp_path: Path, strategy: str, model: list[str], written: str
) -> None:
    output = tmp_path / "run"
    finetuned(data, *model, *SHORT, "--strategy", strategy, "--output", output, "--test", data)
    logs = {"epochs.csv", "steps.csv", "tensorboard", "checkpoints"}
    files = {path.name for path in output.iterdir()}
    assert files == {"config.toml", "model.json", "report.json", "report.html", written, *logs}
    report = report_of(output)
    assert report["strategy"] == strategy
    assert (report["adapter_bytes"] is not None) == (written == "adapter")
    assert report["pictures"] == {"train": 20, "validation": 4, "test": 24}
    run = load_run(output)
    images = open_images(data).with_transform(run.transform)
    logits = run.model(torch.stack([images[index][0] for index in range(len(images))]))
    right = (logits.argmax(1) == torch.tensor(images.labels)).double().mean().item()
    assert right == report["evaluation"]["accuracy"]


@pytest.fixture(scope="module")
def learned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that learns its task, tested with one picture in the wrong folder, and what was printed."""
    output = tmp_path_factory.mktemp("learned")
    mislabelled = write_pictures(output / "test", count=2)
    (mislabelled / "dark" / "00.png").rename(mislabelled / "light" / "swapped.png")
    return output / "run", finetuned(data, *LEARNING, "--output", output / "run", "--test", mislabelled)


def test_it_learns(learned: tuple[Path, Any]) -> None:
    report = report_of(learned[0])
    assert report["epochs"][-1]["accuracy"] == 1.0
    assert report["evaluation"]["accuracy"] == 0.75
    assert "75.0%" in learned[1].stdout
    assert report["epochs"][-1]["train_loss"] < report["epochs"][0]["train_loss"]


def test_the_report_adds_up(learned: tuple[Path, Any]) -> None:
    report = report_of(learned[0])
    scores = report["evaluation"]
    confusion = torch.tensor(scores["confusion"])
    assert confusion.sum() == scores["pictures"] == 4
    assert [row["class"] for row in scores["classes"]] == list(CLASSES) == report["classes"]
    assert scores["accuracy"] == confusion.trace() / confusion.sum()
    assert report["parameters"]["trainable_parameters"] == report["parameters"]["total_parameters"]
    assert report["config"]["strategy"] == "full"
    assert report["recommendation"]["strategy"] == "feature_extraction"
    assert len(report["epochs"]) == 8


def test_the_page_needs_nothing_else(learned: tuple[Path, Any]) -> None:
    page = (learned[0] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{1,30})', page)
    assert len(sources) >= 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for text in ("resnet18", "Confusion matrix", "dark", "light", "Recall", "layer4.", "11,177,538"):
        assert text in page
    assert "{{" not in page


def test_the_worst_pictures_are_shown(learned: tuple[Path, Any]) -> None:
    worst = report_of(learned[0])["evaluation"]["worst"]
    assert [(row["name"], row["true"], row["predicted"]) for row in worst] == [
        ("light/swapped.png", "light", "dark")
    ]
    page = (learned[0] / "report.html").read_text()
    assert "light/swapped.png" in page
    assert page.count("<figure>") == 1


def test_a_config_says_what_flags_say(data: Path, tmp_path: Path) -> None:
    flags = ["--strategy", "feature_extraction", "--mixup", 0.2]
    finetuned(data, *RESNET, *SHORT, *flags, "--output", tmp_path / "flags")
    config = tmp_path / "flags" / "config.toml"
    finetuned("--config", config, "--output", tmp_path / "file")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("flags", "file"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    finetuned("--config", config, "--output", tmp_path / "other", "--seed", 1)
    assert report_of(tmp_path / "other")["config"]["seed"] == 1
    assert report_of(tmp_path / "other")["config"]["mixup"] == 0.2


def test_a_dry_run_shows_the_plan_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    result = finetuned(
        data, *RESNET, *SHORT, "--strategy", "gradual", "--output", tmp_path / "run", "--dry-run"
    )
    for text in ("resnet18, gradual", "20 training, 4 validation", "Stages unfreeze", "kept for backward"):
        assert text in result.stdout
    assert "Advice for these data: feature_extraction" in result.stdout
    assert not (tmp_path / "run").exists()


def test_without_a_strategy_the_advised_one_is_taken(data: Path, tmp_path: Path) -> None:
    finetuned(data, *RESNET, *SHORT, "--output", tmp_path)
    assert report_of(tmp_path)["config"]["strategy"] == "feature_extraction"


def test_cached_features_ask_for_no_strategy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = recommend_strategy(10**6, 2)
    assert advice.strategy != "feature_extraction"
    monkeypatch.setattr("fastlora.transfer.finetune.job.recommend_strategy", lambda *a, **more: advice)
    finetuned(data, *RESNET, *SHORT, "--cache-features", "--output", tmp_path)
    assert report_of(tmp_path)["config"]["strategy"] == "feature_extraction"


def test_cached_features_train_the_same_head(data: Path, tmp_path: Path) -> None:
    arguments = [*DINO, *SHORT, "--strategy", "feature_extraction", "--cache-features"]
    finetuned(data, *arguments, "--output", tmp_path)
    report, run = report_of(tmp_path), load_run(tmp_path)
    images = open_images(data).with_transform(run.transform)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert len(written) == 2
    finetuned(data, *arguments, "--output", tmp_path, "--resume")
    again = report_of(tmp_path)
    assert again["evaluation"] == report["evaluation"]
    # the features were read, not computed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()} == written
    assert images.classes == run.classes


def test_a_run_resumes_and_another_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    arguments = [data, *RESNET, *SHORT, "--strategy", "feature_extraction", "--output", tmp_path]
    finetuned(*arguments)
    before = (tmp_path / "model.safetensors").read_bytes()
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "resume it (--resume), or choose another folder (--output)" in refused.stderr
    finetuned(*arguments, "--resume")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    refused = invoke(*arguments, "--resume", "--image-size", 48)
    assert refused.exit_code == 2
    assert "--image-size was 32, is 48 now" in refused.stderr
    refused = invoke(*arguments, "--resume", "--lr", 0.5)
    assert refused.exit_code == 2
    assert "--lr was 0.003, is 0.5 now" in refused.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_json_is_the_report(data: Path, tmp_path: Path) -> None:
    result = finetuned(
        data, *RESNET, *SHORT, "--strategy", "feature_extraction", "--output", tmp_path, "--json"
    )
    assert json.loads(result.stdout)["evaluation"] == report_of(tmp_path)["evaluation"]


# by default the trainer runs in two processes in test_training_processes, a command in test_domain_training
@pytest.mark.full
def test_two_processes_write_one_run(data: Path, tmp_path: Path) -> None:
    # a BatchNorm in train mode would see half a batch in each process
    arguments = [str(data), *RESNET, *SHORT, "--strategy", "feature_extraction", "--output"]
    finetuned(*arguments, tmp_path / "one")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastlora.cli"]
    subprocess.run(
        [sys.executable, *command, "finetune", *arguments, str(tmp_path / "two")],
        check=True,
        capture_output=True,
    )
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5)
    assert report_of(tmp_path / "two")["evaluation"]["accuracy"] == pytest.approx(
        report_of(tmp_path / "one")["evaluation"]["accuracy"]
    )


def test_batch_norms_of_frozen_stages_train_on_purpose(data: Path, tmp_path: Path) -> None:
    given = [data, *RESNET, "--strategy", "feature_extraction", "--dry-run", "--json", "--output", tmp_path]
    plain, normed = (json.loads(finetuned(*given, *more).stdout) for more in ([], ["--train-batch-norm"]))
    # 4,800 channels, each with a weight and a bias
    difference = (plan["parameters"]["trainable_parameters"] for plan in (plain, normed))
    assert next(difference) + 2 * 4800 == next(difference)


def test_a_hidden_layer_is_trained_and_saved(data: Path, tmp_path: Path) -> None:
    finetuned(data, *RESNET, *SHORT, "--strategy", "lora", "--hidden", 7, "--output", tmp_path)
    run = load_run(tmp_path)
    answers = predict_files(run, [data])
    assert run.model.get_submodule("fc.hidden").weight.shape == (7, 512)
    assert len(answers) == 24


def test_help_teaches_every_option() -> None:
    result = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"})
    for text in ("--label-smoothing", "exponential moving average", "flowers", "--dry-run", "cosine"):
        assert text in result.stdout
