"""``fastlora demo --methods``: every way to train, on few and small pictures."""

import gc
import json
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fastlora
from fastlora.cli import app
from fastlora.transfer import demo as demo_module
from fastlora.transfer.data.bundled import Splits, load_images, normalise, split
from fastlora.transfer.fit import run_batched
from fastlora.transfer.methods import METHODS, choose_methods
from fastlora.transfer.models.backbones import dinov2_vits14
from fastlora.transfer.plots import accuracy_figure, draw_accuracies
from fastlora.transfer.recipes import RECIPES
from fastlora.transfer.report import MethodResult
from fastlora.transfer.study import Study
from fastlora.transfer.training.device import make_accelerator
from fastlora.transfer.tuning import Tuning, TuningRun, _speed_up_attention, tune
from tests.cases import cases

SIZE, STEPS, SEED = 28, 3, 5
HEAD = 385 * 2
BACKBONE = sum(p.numel() for p in dinov2_vits14(SIZE, 1).parameters()) - 385
# what each adds to the backbone and the head: LoRA of rank 8 in q, k, v, out and the MLP; two bottlenecks of
# 64 with their biases in each block; ten tokens in each block
ADDED = {
    "linear_probe": 0,
    "lora": 12 * 8 * ((384 + 1152) + (384 + 384) + 2 * (384 + 1536)),
    "adapters": 12 * 2 * (2 * 64 * 384 + 64 + 384),
    "deep_prompts": 12 * 10 * 384,
    "full": 0,
}
FOLDERS = {"lora": "adapter", "adapters": "bottleneck", "deep_prompts": "prompts"}
PICTURES = {"curves.png", "accuracy.png", "confusion.png"}


@dataclass(frozen=True)
class Run:
    folder: Path
    stdout: str
    shown: Sequence[MethodResult]
    still_held: int

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report

    def method(self, strategy: str) -> dict[str, Any]:
        found: dict[str, Any] = next(m for m in self.report["methods"] if m["strategy"] == strategy)
        return found


def small_parts() -> Splits:
    return split(load_images("elpv", SIZE).first(160), train=64, validation=32, seed=SEED)


def run_demo(methods: str, folder: Path) -> Run:
    models: list[weakref.ref[nn.Module]] = []
    held: list[int] = []
    shown: list[MethodResult] = []

    def watched_tune(study: Study, tuning: Tuning) -> tuple[MethodResult, nn.Module]:
        gc.collect()
        held.append(sum(model() is not None for model in models))
        result, model = tune(study, tuning)
        models.append(weakref.ref(model))
        return result, model

    def watched_draw(results: Sequence[MethodResult], title: str) -> bytes:
        shown.extend(results)
        return draw_accuracies(results, title)

    arguments = ["demo", "--methods", methods, "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "elpv", replace(RECIPES["elpv"], image_size=SIZE, train=64, validation=32))
        patch.setattr(demo_module, "load_images", lambda *args: load_images(*args).first(160))
        patch.setattr(demo_module, "tune", watched_tune)
        patch.setattr(demo_module, "draw_accuracies", watched_draw)
        result = CliRunner().invoke(app, [*arguments, "--max-steps", str(STEPS), "--seed", str(SEED)])
    assert result.exit_code == 0, result.output
    return Run(folder, result.stdout, shown, sum(held))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # pictures this small gain nothing from a second core, and lose a lot if it is busy
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_demo("all", tmp_path_factory.mktemp("all"))


def test_all_methods_are_reported(everything: Run) -> None:
    assert [m["strategy"] for m in everything.report["methods"]] == list(ADDED)
    assert everything.report["eager_reference"] is None
    assert {path.name for path in everything.folder.iterdir()} == {
        "report.json",
        *PICTURES,
        *FOLDERS.values(),
    }


@pytest.mark.parametrize("strategy", ADDED)
def test_report_of_a_method(everything: Run, strategy: str) -> None:
    method = everything.method(strategy)
    trained = ADDED[strategy] + HEAD + (BACKBONE if strategy == "full" else 0)
    assert method["trainable_parameters"] == trained
    assert method["total_parameters"] == BACKBONE + ADDED[strategy] + HEAD

    counts = torch.tensor(method["confusion"]).double()
    right = counts.trace().item() / 64
    assert counts.sum() == 64
    assert method["accuracy"] == pytest.approx(right)
    assert method["accuracy_standard_error"] == pytest.approx((right * (1 - right) / 64) ** 0.5)

    assert method["adapter_folder"] == FOLDERS.get(strategy)
    # the probe also keeps mean and scale of the features
    assert 4 * trained < method["adapter_bytes"] < 4 * trained + 50_000
    assert method["hyper_parameters"]["max_steps"] == STEPS
    assert ("backend" in method["hyper_parameters"]) == (strategy in ("lora", "adapters"))
    assert method["seconds"] >= sum(epoch["seconds"] for epoch in method["epochs"]) > 0
    if sys.platform == "linux":
        assert method["peak_memory_bytes"] > 2e8


@pytest.mark.parametrize(("strategy", "folder"), FOLDERS.items(), ids=FOLDERS)
def test_saved_files_make_the_reported_predictions(everything: Run, strategy: str, folder: str) -> None:
    accelerator, test = make_accelerator(), small_parts().test
    model = fastlora.load_adapter(dinov2_vits14(SIZE, 2), everything.folder / folder).eval()
    model.to(accelerator.device)
    predicted = run_batched(model, test.images, normalise, accelerator).argmax(dim=1)
    assert (predicted == test.labels).double().mean().item() == everything.method(strategy)["accuracy"]


def test_plot_has_a_labelled_point_for_each(everything: Run) -> None:
    (axes,) = accuracy_figure(everything.shown, "cells").axes
    points = [bar[0].get_xydata().tolist()[0] for bar in axes.containers]
    labels = [label.get_text().splitlines()[0] for label in axes.texts]
    methods = everything.report["methods"]
    assert points == [[m["trainable_parameters"], pytest.approx(100 * m["accuracy"])] for m in methods]
    assert labels == [m["title"] for m in methods]


def test_what_is_printed(everything: Run) -> None:
    for method in everything.report["methods"]:
        assert f"{method['trainable_parameters']:,}" in everything.stdout
        assert f"{method['accuracy']:.1%}" in everything.stdout
        for word in method["title"].split():
            assert word in everything.stdout
    assert "(100 %)" in everything.stdout
    assert "eager" not in everything.stdout
    assert "…" not in everything.stdout
    assert "adapter/, bottleneck/, prompts/ to" in " ".join(everything.stdout.split())


def test_no_model_outlives_its_method(everything: Run) -> None:
    assert everything.still_held == 0


def test_subset_gives_the_numbers_of_the_whole(everything: Run, tmp_path: Path) -> None:
    subset = run_demo("prompts, probe", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", *PICTURES, "prompts"}
    measured = ("seconds", "peak_memory_bytes", "epochs")
    for method, strategy in zip(subset.report["methods"], ["linear_probe", "deep_prompts"], strict=True):
        same = everything.method(strategy)
        assert [m["loss"] for m in method["epochs"]] == [m["loss"] for m in same["epochs"]]
        for key in same.keys() - measured:
            assert method[key] == same[key]


class Silent:
    def note(self, text: str) -> None:
        """Say nothing."""

    def advance(
        self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        """Say nothing."""


def should_train(method: str, name: str) -> bool:
    marks = {"lora": ("lora_A", "lora_B"), "adapter": ("adapter",), "prompts": ("prompts.tokens",)}
    return method == "full" or name.startswith("heads.") or any(mark in name for mark in marks[method])


@pytest.mark.parametrize("method", cases(["lora", "prompts"], ["adapter", "full"]))
def test_what_should_train_does_and_nothing_else(method: str) -> None:
    tuning = RECIPES["elpv"].tunings[method]
    # with neither weight decay nor warm-up, only what gets a gradient moves
    settings = replace(tuning.fit, weight_decay=0.0, warmup=0.0, batch_size=8, max_steps=4)
    study = Study(small_parts(), SIZE, make_accelerator(), SEED, Silent())
    run = TuningRun(study, replace(tuning, fit=settings))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.run_epoch()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert run.fit.finished
    assert moved == {name for name in before if should_train(method, name)}
    if method == "prompts":
        change = run.model.get_parameter("prompts.tokens") - before["prompts.tokens"]
        assert change.abs().amax(dim=(1, 2)).min() > 0


@pytest.mark.parametrize(
    ("method", "hooks"), [("lora", 0), ("adapter", 12), ("prompts", 12), ("full", 0)], ids=lambda value: value
)
def test_faster_attention_says_the_same(method: str, hooks: int) -> None:
    tuning = RECIPES["elpv"].tunings[method]
    model = tuning.apply(dinov2_vits14(SIZE, 2), **tuning.options).double()
    torch.nn.init.normal_(model.get_parameter("heads.head.weight"))
    pictures = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    expected = model(pictures)
    before = count_hooks(model)
    _speed_up_attention(model)
    assert count_hooks(model) - before == hooks
    torch.testing.assert_close(model(pictures), expected, rtol=1e-10, atol=1e-10)


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("data", RECIPES)
def test_recipe_has_every_method(data: str) -> None:
    assert ("probe", *RECIPES[data].tunings) == METHODS


def test_epochs_are_those_of_all_but_the_probe() -> None:
    recipe = RECIPES["elpv"].limited(2, 7)
    assert {tuning.fit.epochs for tuning in recipe.tunings.values()} == {2}
    assert {tuning.fit.max_steps for tuning in recipe.tunings.values()} == {7}
    assert (recipe.probe.epochs, recipe.probe.max_steps) == (RECIPES["elpv"].probe.epochs, 7)
    # the probe's batches are the larger ones
    assert recipe.usable_pictures() == 7 * 32


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["all"], METHODS),
        (["full", "all"], METHODS),
        (["full", "lora", "full"], ("lora", "full")),
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
    result = CliRunner().invoke(app, ["demo", "--methods", methods, "--output", str(output)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {told}")
    assert len(result.stderr.splitlines()) == 1
    assert not output.exists()


def test_help_names_every_method() -> None:
    printed = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).stdout
    for name in METHODS:
        assert name in printed
