"""All strategies on real pictures, three seeds: the table and plot under ``docs/results/finetune``.

Each run is kept as one line of ``runs.jsonl``; what is there is not run again. ``make results``.
"""

import statistics
import tempfile
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.runs import Runs, page_parser, percent, table
from fastlora._core.extras import package_folder
from fastlora.cli._progress import LiveReporter
from fastlora.transfer.data import LabelledImages, open_images, stratified_split
from fastlora.transfer.data.bundled import load_images
from fastlora.transfer.finetune import FinetuneSettings, finetune
from fastlora.transfer.report.style import BLUE, VERMILION, heading, headline, new_figure, plain
from fastlora.transfer.training import TrainSettings

MODELS = ("dinov2_vits14", "efficientnet_lite0")
STRATEGIES = (
    "feature_extraction",
    "fine_tuning",
    "gradual",
    "lp_ft",
    "full",
    "lora",
    "adapter",
    "prompt",
)
# convolutions have no blocks for these
TRANSFORMER_ONLY = ("adapter", "prompt")
# ImageNet's convolutions bear faster rates than DINOv2's blocks; chosen before the first run
CONVOLUTION_RATES = {"fine_tuning": 1e-3, "gradual": 3e-4, "lp_ft": 3e-4, "full": 3e-4}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Data:
    """A data set and how much of it is used.

    Attributes:
        title: For readers.
        image_size: Height and width in pixels.
        parts: Pictures to train on, to watch and to judge with.
        epochs: Of all strategies but the probe.
        flip: Whether mirrored pictures keep their label.
    """

    title: str
    image_size: int
    parts: tuple[int, int, int]
    epochs: int
    flip: bool


DATA = {
    "mnist5k": Data("MNIST 5k (56 px)", 56, (600, 200, 1000), 3, False),
    "elpv": Data("ELPV mono (84 px)", 84, (540, 120, 241), 3, True),
    "textile": Data("Textile, ImageFolder (84 px)", 84, (360, 120, 400), 3, True),
}
PROBE_EPOCHS = 60


def pictures(name: str) -> LabelledImages:
    """All pictures of a data set."""
    if name == "textile":
        folder = package_folder(
            "conformal_clip_data",
            distribution="conformal-clip-data",
            purpose="the textile pictures",
            extra="results",
        )
        return open_images(folder / "data" / "textile_images" / "simulated")
    return load_images(name, DATA[name].image_size).labelled()


def split(name: str, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """What is trained and validated on, and what is tested on."""
    spec, pool = DATA[name], pictures(name)
    total = sum(spec.parts)
    if total < len(pool):
        shares = [total / len(pool), 1 - total / len(pool)]
        pool = pool.subset(stratified_split(pool.labels, shares, seed=seed)[0])
    first, test = stratified_split(pool.labels, [1 - spec.parts[2] / total, spec.parts[2] / total], seed=seed)
    return pool.subset(first), pool.subset(test)


def run(data: str, model: str, strategy: str, seed: int, reporter: LiveReporter) -> dict[str, Any]:
    """One row of ``runs.jsonl``."""
    spec = DATA[data]
    train, test = split(data, seed)
    probe = strategy == "feature_extraction"
    with tempfile.TemporaryDirectory() as folder:
        settings = FinetuneSettings(
            data=data,
            output=folder,
            validation_share=spec.parts[1] / len(train),
            model=model,
            strategy=strategy,
            image_size=spec.image_size,
            flip=spec.flip,
            cache_features=probe,
            lr=CONVOLUTION_RATES.get(strategy) if model == "efficientnet_lite0" else None,
            head_factor=10.0 if model == "efficientnet_lite0" and strategy in CONVOLUTION_RATES else None,
        )
        training = TrainSettings(epochs=PROBE_EPOCHS if probe else spec.epochs, batch_size=16, seed=seed)
        report = finetune(settings, training, reporter, images=train, test_images=test)
    return {
        "data": data,
        "model": model,
        "strategy": strategy,
        "seed": seed,
        "accuracy": report["evaluation"]["accuracy"],
        "balanced_accuracy": report["evaluation"]["balanced_accuracy"],
        "seconds": report["total_seconds"] if probe else report["seconds"],
        "trainable_percent": report["parameters"]["trainable_percent"],
        "trainable_parameters": report["parameters"]["trainable_parameters"],
        "pictures": report["pictures"],
        "config": {key: report["config"][key] for key in ("epochs", "batch_size", "lr", "head_factor")},
        "precision": report["precision"],
        "features_precision": report["precision"],
        "device": f"{report['device_name']}, {report['threads']} threads",
        "versions": report["versions"],
    }


def main() -> None:
    """Run what is missing and write the table and the plot."""
    parser = page_parser(__doc__, "docs/results/finetune")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--reverse", action="store_true", help="Begin at the end, beside another process.")
    parser.add_argument("--table-only", action="store_true", help="Draw what is there, and run nothing.")
    arguments = parser.parse_args()
    runs = Runs(arguments.output / "runs.jsonl", "data", "model", "strategy", "seed")
    wanted = [
        (data, model, strategy, seed)
        for seed in arguments.seeds
        for data in arguments.data
        for model in arguments.models
        for strategy in STRATEGIES
        if model == MODELS[0] or strategy not in TRANSFORMER_ONLY
    ]
    console = Console()
    for number, key in enumerate(wanted[::-1] if arguments.reverse else wanted, start=1):
        if arguments.table_only or runs.has(*key):
            continue
        with LiveReporter(console) as reporter:
            row = run(*key, reporter)
        runs.add(row)
        console.print(f"{number}/{len(wanted)} {key}: {row['accuracy']:.1%} in {row['seconds']:.0f} s")
    rows = runs.rows()
    (arguments.output / "README.md").write_text(page(rows))
    draw(rows).savefig(arguments.output / "accuracy.png", dpi=120)


def page(rows: list[dict[str, Any]]) -> str:
    """The page: one table for each data set."""
    probes = [row for row in rows if row["strategy"] == "feature_extraction"]
    # rows without the field are older than features in the run's precision
    features = " and ".join(sorted({row.get("features_precision", "fp32") for row in probes}))
    said = {"device": rows[0]["device"], "precision": rows[0]["precision"], "features": features}
    text = [INTRODUCTION.format(**said)]
    for data, spec in DATA.items():
        text += [f"\n## {spec.title}: {spec.parts[0]} training, {spec.parts[2]} test pictures\n"]
        heads = ("model", "strategy", "trains", "accuracy %", "balanced %", "seconds", "seeds")
        cells = []
        for model in MODELS:
            for strategy in STRATEGIES:
                found = [r for r in rows if (r["data"], r["model"], r["strategy"]) == (data, model, strategy)]
                if found:
                    accuracy = percent([r["accuracy"] for r in found])
                    balanced = percent([r["balanced_accuracy"] for r in found])
                    seconds = f"{min(r['seconds'] for r in found):.0f}"
                    trains = f"{found[0]['trainable_percent']:.3g} %"
                    cells.append([model, strategy, trains, accuracy, balanced, seconds, str(len(found))])
        text += table(heads, cells)
    return "\n".join(text) + "\n"


INTRODUCTION = """# Fine-tuning strategies on real pictures

`make results` regenerates this page and the plot from `runs.jsonl`, running what is missing there. Mean
± standard deviation over the seeds, which choose split, order, augmentation and initial weights. Device:
{device}; precision of the products: {precision}, of those that made the probe's features: {features}.
Seconds are those of the optimiser steps, of the fastest seed (other work ran beside some of them); the
probe's are everything, features included. Trains: the most that ever trains, in percent of all parameters.

Each strategy has its own default rate: for the probe and LoRA those that the demo chose on ELPV's
validation pictures, for the others first choices, on EfficientNet-Lite0 some fixed before the first run.
All but the probe see the training pictures three times, the probe sixty times as cached features.
`adapter` and `prompt` need transformer blocks.

What to read from it: on the digits LoRA, adapters and gradual unfreezing lead on DINOv2, LoRA on
EfficientNet-Lite0. On the solar cells differences are within the spread of the seeds; adapters lead
there. Where three epochs are too few for a strategy's small rates (`lp_ft`, `fine_tuning`, `full` on
digits) the probe is better and cheaper, and ten prompts learn nothing on the textiles, half of which are
of one class; small defects vanish at 84 px. ELPV gains with size and time: at 112 px and six epochs
`fastlora demo --data elpv` measured 91.3 to 91.7 % for LoRA and 91.7 to 92.1 % for the probe.

![accuracy](accuracy.png)
"""


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Mean accuracy with its standard deviation, a panel for each data set and model."""
    figure = new_figure(11, 7)
    panels = figure.subplots(len(MODELS), len(DATA), squeeze=False)
    for line, model in zip(panels, MODELS, strict=True):
        for axes, (data, spec) in zip(line, DATA.items(), strict=True):
            found: dict[str, list[float]] = {}
            for row in rows:
                if (row["data"], row["model"]) == (data, model):
                    found.setdefault(row["strategy"], []).append(100 * row["accuracy"])
            names = [name for name in reversed(STRATEGIES) if name in found]
            means = [statistics.mean(found[name]) for name in names]
            errors = [statistics.stdev(found[n]) if len(found[n]) > 1 else 0.0 for n in names]
            colours = [VERMILION if name in ("lora", "adapter", "prompt") else BLUE for name in names]
            for name, mean, error, colour in zip(names, means, errors, colours, strict=True):
                axes.errorbar(mean, name, xerr=error, color=colour, marker="o", capsize=3)
            heading(axes, f"{model}\n{spec.title}")
            axes.set(xlabel="Test pictures labelled right (%)")
            plain(axes, grid="x")
    headline(figure, "Orange: what is added to a frozen model trains; blue: the model's own layers")
    return figure


if __name__ == "__main__":
    main()
