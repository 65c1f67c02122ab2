"""``fastlora demo --methods``: the ways to train that it doesn't compare by default."""

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import normalize
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.transfer.demo import study
from fastlora.transfer.demo.methods import METHODS, choose_methods
from fastlora.transfer.demo.study import transforms
from fastlora.transfer.finetune.run import Run, begin
from fastlora.transfer.plots import accuracy_figure
from fastlora.transfer.strategies import STRATEGIES
from tests.demo_runs import BACKBONE, HEAD_WIDTH, PICTURES, TEST, TRAIN, DemoRun, demo

HEAD = HEAD_WIDTH * 2
# what each method that test_demo doesn't train adds to the backbone and the head: two bottlenecks of 64 with
# their biases in each block; ten tokens in each block
ADDED = {
    "adapter": 12 * 2 * (2 * 64 * 384 + 64 + 384),
    "prompt": 12 * 10 * 384,
    "full": 0,
}
FOLDERS = {"adapter": "bottleneck", "prompt": "prompts"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # pictures this small gain nothing from a second core, and lose a lot if it is busy
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def held() -> list[int]:
    """How many models of methods before were still there whenever a method began."""
    return []


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory, held: list[int]) -> DemoRun:
    models: list[weakref.ref[nn.Module]] = []

    def watched(*given: Any, **named: Any) -> Run:
        gc.collect()
        held.append(sum(model() is not None for model in models))
        run = begin(*given, **named)
        models.append(weakref.ref(run.job.model))
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "begin", watched)
        folder = tmp_path_factory.mktemp("rest")
        return demo("elpv", folder, "--epochs", "1", "--methods", "full, prompts,adapter")


@pytest.mark.full
def test_chosen_methods_are_reported_in_their_order(rest: DemoRun) -> None:
    assert [m["strategy"] for m in rest.report["methods"]] == list(ADDED)
    assert rest.report["eager_reference"] is None
    assert {path.name for path in rest.folder.iterdir()} == {
        "report.json",
        *PICTURES,
        *FOLDERS.values(),
    }


@pytest.mark.full
@pytest.mark.parametrize("strategy", ADDED)
def test_report_of_a_method(rest: DemoRun, strategy: str) -> None:
    method = rest.method(strategy)
    trained = ADDED[strategy] + HEAD + (BACKBONE if strategy == "full" else 0)
    assert method["trainable_parameters"] == trained
    assert method["total_parameters"] == BACKBONE + ADDED[strategy] + HEAD

    counts = torch.tensor(method["confusion"]).double()
    right = counts.trace().item() / TEST
    assert counts.sum() == TEST
    assert method["accuracy"] == pytest.approx(right)
    assert method["accuracy_standard_error"] == pytest.approx((right * (1 - right) / TEST) ** 0.5)

    assert method["adapter_folder"] == FOLDERS.get(strategy)
    # a file has names, too
    assert 4 * trained <= method["adapter_bytes"] < 4 * trained + 50_000
    assert method["hyper_parameters"]["epochs"] == len(method["epochs"]) == 1
    assert method["hyper_parameters"]["lr"] == STRATEGIES[strategy].lr
    assert ("backend" in method["hyper_parameters"]) == (strategy == "adapter")
    assert method["seconds"] >= sum(epoch["seconds"] for epoch in method["epochs"]) > 0
    if sys.platform == "linux":
        assert method["peak_memory_bytes"] > 2e8


@pytest.mark.full
@pytest.mark.parametrize("strategy", FOLDERS)
def test_saved_files_make_the_reported_predictions(rest: DemoRun, strategy: str) -> None:
    assert rest.accuracy_of_file(FOLDERS[strategy]) == rest.method(strategy)["accuracy"]


@pytest.mark.full
def test_plot_has_a_labelled_point_for_each(rest: DemoRun) -> None:
    methods = rest.report["methods"]
    (axes,) = accuracy_figure(methods, "cells").axes
    points = [bar[0].get_xydata().tolist()[0] for bar in axes.containers]
    labels = [label.get_text().splitlines()[0] for label in axes.texts]
    assert points == [[m["trainable_parameters"], pytest.approx(100 * m["accuracy"])] for m in methods]
    assert labels == [m["title"] for m in methods]


@pytest.mark.full
def test_what_is_printed(rest: DemoRun) -> None:
    for method in rest.report["methods"]:
        assert f"{method['trainable_parameters']:,}" in rest.stdout
        assert f"{method['accuracy']:.1%}" in rest.stdout
        for word in method["title"].split():
            assert word in rest.stdout
    assert "(100 %)" in rest.stdout
    assert "eager" not in rest.stdout
    assert "…" not in rest.stdout
    assert "confusion.png, bottleneck/, prompts/ to" in " ".join(rest.stdout.split())


@pytest.mark.full
@pytest.mark.usefixtures("rest")
def test_no_model_outlives_its_method(held: list[int]) -> None:
    assert held == [0] * len(ADDED)


@pytest.mark.full
def test_a_method_alone_gives_the_same_numbers_in_a_folder_of_an_older_run(
    rest: DemoRun, tmp_path: Path
) -> None:
    (tmp_path / "prompts").mkdir()
    subset = demo("elpv", tmp_path, "--epochs", "1", "--methods", "prompts")
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", *PICTURES, "prompts"}
    measured = ("seconds", "peak_memory_bytes", "epochs")
    (method,), same = subset.report["methods"], rest.method("prompt")
    assert [m["train_loss"] for m in method["epochs"]] == [m["train_loss"] for m in same["epochs"]]
    for key in same.keys() - measured:
        assert method[key] == same[key]


# test_demo trains the other two by default
@pytest.mark.full
def test_epochs_are_those_of_all_methods_but_the_probe(rest: DemoRun, tmp_path: Path) -> None:
    both = demo("elpv", tmp_path, "--methods", "probe,lora", "--epochs", "1")
    records = both.report["methods"] + rest.report["methods"]
    assert {METHODS[name].strategy for name in METHODS} == {m["strategy"] for m in records}
    for method in records:
        epochs = 100 if method["strategy"] == "feature_extraction" else 1
        assert method["hyper_parameters"]["epochs"] == len(method["epochs"]) == epochs
    assert both.method("feature_extraction")["hyper_parameters"]["weight_decay"] == 1e-4
    # of all training pictures, by 16
    assert both.method("lora")["steps"] == TRAIN // 16


def test_pictures_that_no_step_reaches_are_not_read(tmp_path: Path) -> None:
    run = demo("elpv", tmp_path, "--methods", "probe", "--max-steps", "1")
    # a batch of the probe is the largest
    assert run.report["pictures"]["train"] == 32 < TRAIN
    assert ("Linear probe: features of 32 pictures", 32, 32) in [step[:3] for step in run.steps]


def test_methods_are_strategies() -> None:
    assert {method.strategy for method in METHODS.values()} <= set(STRATEGIES)


def test_pictures_reach_the_backbone_as_those_it_was_trained_on() -> None:
    picture = torch.randint(0, 256, (3, 5, 4), dtype=torch.uint8)
    expected = normalize(picture / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(transforms(())[1](picture), expected)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["all"], tuple(METHODS)),
        (["full", "all"], tuple(METHODS)),
        (["full", "lora", "full"], ("lora", "full")),
        (["prompt", "prompts", "feature_extraction"], ("probe", "prompts")),
        ([method.strategy for method in METHODS.values()], tuple(METHODS)),
    ],
    ids=",".join,
)
def test_chosen_methods(names: list[str], chosen: tuple[str, ...]) -> None:
    assert choose_methods(names) == chosen


@pytest.mark.parametrize(
    ("names", "wrong"), [(["Probe"], "Probe"), (["lora", "bias", "x"], "bias"), ([], "")], ids=str
)
def test_unknown_methods(names: list[str], wrong: str) -> None:
    expected = rf"expected methods out of {', '.join(METHODS)}, or all, got '{wrong}'; name one"
    with pytest.raises(ValueError, match=expected):
        choose_methods(names)


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ("probe,loar", "expected --methods out of probe, lora, adapter, prompts, full, or all, got 'loar'"),
        ("probe,", "expected --methods out of probe, lora, adapter, prompts, full, or all, got ''"),
        ("", "expected a value for --methods, got an empty text"),
    ],
)
def test_unknown_method_ends_with_one_line(methods: str, told: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["demo", "--data", "elpv", "--methods", methods, "--output", str(output)]
    )
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {told}")
    assert len(result.stderr.splitlines()) == 1
    assert not output.exists()


def test_help_names_every_method() -> None:
    printed = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).stdout
    for name in METHODS:
        assert name in printed
