"""The demo of a language model: fine-tuned by PEFT, then by the same PEFT model accelerated."""

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastlora._core.environment import environment
from fastlora._core.extras import require
from fastlora._core.files import check_output_folder, write_file, write_report
from fastlora._core.progress import Reporter
from fastlora.transfer.demo.language.dialogues import (
    LICENCE,
    NAME,
    corpus_folder,
    load_dialogues,
    split_dialogues,
)
from fastlora.transfer.demo.language.page import draw_losses, render
from fastlora.transfer.demo.language.quiet import errors_alone, no_bars
from fastlora.transfer.demo.language.recipe import Recipe
from fastlora.transfer.finetune.record import reporting
from fastlora.transfer.models import smollm2
from fastlora.transfer.training.device import best_device, native_precision

_PACKAGES = ("transformers", "peft", "datasets", "trl")


def run_language_demo(
    output: Path,
    reporter: Reporter,
    *,
    quantised: str | None = None,
    max_steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train both, compare, and write ``report.json``, ``report.html``, ``losses.png`` and ``adapter/``.

    The adapter is the accelerated model's, written by PEFT. LoRA's dropout is 0, because PEFT and fastlora
    draw different masks from one seed: without them the two curves are the same but for rounding.

    Args:
        output: Folder for the files, made if missing.
        reporter: Is told about the progress.
        quantised: ``"nf4"`` to train over weights of 4 bits, None for dense ones.
        max_steps: Optimiser steps of each; 30 without it.
        seed: Seed of the split, the order and the first A.

    Returns:
        What ``report.json`` holds.

    Raises:
        ImportError: A package is missing; the message has the commands that install all.
        ValueError: An unknown way to quantise, or a number that is not positive.
        NotADirectoryError: ``output`` is a file, or lies under one.
        PermissionError: ``output`` can't be written to.
        ReportError: The report can't be written; the adapter is saved.
    """
    started = time.perf_counter()
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"expected max_steps of at least 1, got {max_steps}")
    recipe = replace(Recipe(), seed=seed)
    recipe = recipe if max_steps is None else replace(recipe, steps=max_steps)
    # float16 would need its gradients scaled
    dtype = torch.bfloat16 if native_precision() == "bf16" else torch.float32
    with errors_alone():
        _check_packages(quantised)
        check_output_folder(output)
        parts = split_dialogues(load_dialogues(corpus_folder()), test=recipe.test, seed=seed)
        reporter.note(f"Data: {NAME}. Licence: {LICENCE}")
        # what it imports is known to be installed
        from fastlora.transfer.demo.language.compare import Comparison

        with tempfile.TemporaryDirectory(prefix="fastlora-demo-") as temporary, no_bars():
            comparison = Comparison(Path(temporary), parts, recipe, quantised, dtype, reporter)
            results = comparison.run(output)
    report = {
        "model": f"SmolLM2-135M-Instruct, {quantised or 'dense'} weights",
        "dataset": NAME,
        "licence": LICENCE,
        "dialogues": {"train": len(parts[0]), "test": len(parts[1])},
        "quantised": quantised,
        "recipe": asdict(recipe),
        **environment(best_device(), "bf16" if dtype == torch.bfloat16 else "fp32", *_PACKAGES),
        **results,
        "total_seconds": time.perf_counter() - started,
    }
    with reporting(output):
        write_report(output / "report.json", report)
        losses = draw_losses(report)
        write_file(output / "losses.png", losses)
        write_file(output / "report.html", render(report, losses).encode())
    return report


def _check_packages(quantised: str | None) -> None:
    """Refuse before the first minute what would fail after it."""
    smollm2.check_installed()
    corpus_folder()
    for name in _PACKAGES:
        require(name, distribution=name, purpose="the demo", command=smollm2.INSTALL)
    smollm2.check_quantised(quantised)
