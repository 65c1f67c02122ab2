"""Pictures as the part that trains sees them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlora._core.progress import Reporter
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.finetune.cached import features_of
from fastlora.transfer.finetune.job import Job
from fastlora.transfer.finetune.settings import FinetuneSettings

FEATURES = "features"

View = Callable[[LabelledImages], LabelledImages]


def view_of(job: Job, settings: FinetuneSettings, output: Path, reporter: Reporter, accelerator: Any) -> View:
    """What the trained part sees of pictures: themselves, or their features, kept in the output folder."""
    if not settings.cache_features:
        return lambda images: images
    return lambda images: frozen_features(job, images, output, reporter, accelerator)


def frozen_features(
    job: Job, images: LabelledImages, output: Path, reporter: Reporter, accelerator: Any
) -> LabelledImages:
    """The same examples as what the head reads of them in the run's precision, kept in the output folder."""

    def told(done: int, total: int) -> None:
        reporter.advance(f"features of {total:,} pictures", done, total, None)

    size = job.training.batch_size
    return features_of(job.model, job.head, images, output / FEATURES, size, told, accelerator)
