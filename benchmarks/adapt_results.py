"""Adaptation methods on real domains, five seeds: the table under ``docs/results/adapt``.

``make results-adapt``. Features are computed once, which takes a few minutes on two cores.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import Tensor

from fastlora.domain.adaptation import METHODS, AdaptResult, AdaptSettings, adapt_features
from fastlora.domain.bound import ben_david_bound
from fastlora.domain.shift import diagnose_shift
from fastlora.transfer._extras import package_folder
from fastlora.transfer.backbones import dinov2_vits14
from fastlora.transfer.data import LabelledImages, cached_features, pretrained_transforms
from fastlora.transfer.data.sources import Files
from fastlora.transfer.finetune.cached import read_by
from fastlora.transfer.report import write_report

SEEDS = range(5)
TASKS = (("mono", "poly"), ("poly", "mono"))
CLASSES = ("functional", "defective")
IMAGE_SIZE = 224


def elpv(kind: str) -> LabelledImages:
    """The certain ones among the cells of one kind, ``"mono"`` or ``"poly"``."""
    folder = package_folder("elpv_dataset", distribution="elpv-dataset", purpose="the data set elpv") / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    cells = [(path, int(float(p))) for path, p, own in rows if own == kind and float(p) in (0.0, 1.0)]
    paths = [folder / path for path, _ in cells]
    return LabelledImages(CLASSES, tuple(p for _, p in cells), tuple(p.name for p in paths), Files(paths))


def features(kind: str, cache: Path) -> tuple[Tensor, Tensor]:
    """DINOv2's class tokens of all cells of a kind, and their labels."""
    model = dinov2_vits14(IMAGE_SIZE, len(CLASSES))
    head = model.heads
    images = elpv(kind).with_transform(pretrained_transforms("dinov2_vits14", image_size=IMAGE_SIZE)[1])
    return cached_features(lambda batch: read_by(model, head, batch), model, images, cache, head=head)


def main() -> None:
    """Run everything and write the page and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results/adapt"))
    parser.add_argument("--cache", type=Path, default=Path("build/features"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = {kind: features(kind, arguments.cache) for kind in ("mono", "poly")}
    settings = AdaptSettings()
    results = {
        task: {
            name: [
                adapt_features(
                    *found[task[0]],
                    found[task[1]][0],
                    name,
                    AdaptSettings(seed=seed),
                    target_labels=found[task[1]][1],
                )
                for seed in SEEDS
            ]
            for name in track(METHODS, f"{task[0]} to {task[1]}")
        }
        for task in TASKS
    }
    text = [INTRODUCTION.format(settings=", ".join(f"{k} {v}" for k, v in asdict(settings).items()))]
    for task, methods in results.items():
        text += section(task, methods, found)
    (arguments.output / "README.md").write_text("\n".join(text) + "\n")
    record = {
        f"{task[0]} to {task[1]}": {
            name: [[asdict(epoch) for epoch in run.history[-1:]] for run in runs]
            for name, runs in methods.items()
        }
        for task, methods in results.items()
    }
    write_report(arguments.output / "results.json", {"settings": asdict(settings), "last_epochs": record})


INTRODUCTION = """# Adaptation methods on real domains

ELPV solar cells, functional or defective: monocrystalline and polycrystalline ones are two domains with the
same labels (901 and 1,322 cells). DINOv2 ViT-S/14 features at 224 px, computed once; a layer and a classifier
on top are trained. `make results-adapt` regenerates this page. Accuracy on all target cells, mean ± standard
deviation over five seeds, in percent. The last epoch needs no target labels, nor does the one that
information maximisation (IM) selects; the *oracle* is the best epoch by target labels, and no fair result.

No setting was tuned: {settings}.

BBSE assumes that only the shares of the classes move. Here the pictures of a class differ as well, so its
estimate is wrong, which the domain classifier shows: `diagnose_shift` says "both".
"""


def section(
    task: tuple[str, str], methods: dict[str, list[AdaptResult]], found: dict[str, tuple[Tensor, Tensor]]
) -> list[str]:
    """The table of one task, what kind of shift it is, and the bound."""
    (source, labels), (target, truth) = found[task[0]], found[task[1]]
    shift, bound = diagnose_shift(source, labels, target), ben_david_bound(source, labels, target, truth)
    lines = [f"\n## {task[0]} to {task[1]}\n"]
    lines += [
        "| method | last epoch | balanced | selected (IM) | balanced | *oracle* |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in methods.items():
        last = [run.history[-1] for run in runs]
        selected = [run.selected("information_maximisation") for run in runs]
        oracle = [max(epoch.target_accuracy or 0.0 for epoch in run.history) for run in runs]
        cells = [
            METHODS[name].title,
            percent([epoch.target_accuracy for epoch in last]),
            percent([epoch.target_balanced_accuracy for epoch in last]),
            percent([epoch.target_accuracy for epoch in selected]),
            percent([epoch.target_balanced_accuracy for epoch in selected]),
            f"*{percent(oracle)}*",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shares = ", ".join(f"{share:.2f}" for share in shift.labels.target)
    real = ", ".join(f"{float((truth == label).double().mean()):.2f}" for label in shift.labels.classes)
    lines += [
        f"\n`diagnose_shift`: {shift.kind}; a linear classifier tells the domains apart in "
        f"{100 * shift.domain_accuracy:.1f} % of cases. Class shares in the target by BBSE: {shares} "
        f"(really {real}).",
        f"\n```\n{bound}\n```",
    ]
    return lines


def percent(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation, in percent."""
    known: list[Any] = [100 * value for value in values if value is not None]
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known):.1f}"


if __name__ == "__main__":
    main()
