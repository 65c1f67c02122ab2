"""Everything an adaptation needs, made and checked before the first step."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora._core.memory import check_fits
from fastlora._core.progress import Reporter
from fastlora.domain.pictures import open_target
from fastlora.domain.registry import Method, find_method
from fastlora.domain.training.build import Adapting, take_apart
from fastlora.domain.training.settings import DomainSettings
from fastlora.domain.weighting import ImportanceWeights, source_weights
from fastlora.parameters import ParameterReport
from fastlora.transfer.data import LabelledImages, readable
from fastlora.transfer.finetune import job as finetune
from fastlora.transfer.finetune.cached import HeadOnly, Rows
from fastlora.transfer.finetune.job import Job
from fastlora.transfer.finetune.settings import FinetuneSettings
from fastlora.transfer.finetune.view import frozen_features
from fastlora.transfer.models.heads import BottleneckHead
from fastlora.transfer.training import TrainSettings
from fastlora.transfer.training.device import make_accelerator
from fastlora.transfer.training.randomness import derived_seed, seeded


@dataclass(frozen=True)
class Pretrained:
    """What the pretrained model's head reads, as examples that can be trained on.

    Attributes:
        train: Features of the source's pictures to train on.
        validation: Features of the source's pictures that are held out.
        target: Features of the target's pictures.
    """

    train: LabelledImages
    validation: LabelledImages
    target: LabelledImages

    def domains(self) -> tuple[Tensor, Tensor]:
        """Features of the source to train on ``[n, F]``, and of the target ``[m, F]``."""
        return rows(self.train), rows(self.target)


@dataclass(frozen=True)
class DomainJob:
    """An adaptation that can begin.

    Attributes:
        job: The classifier and the source's pictures, as for fine-tuning.
        head: The classifier's last layers, what becomes alike and what is read from it.
        method: What makes the domains alike.
        domain: Settings of the method.
        settings: What is adapted, with the strategy and its rate filled in.
        target: The target's pictures, without a transform.
        labelled: Whether the target's labels are true.
        parameters: What trains, and what memory that takes.
        before: What the head read of all pictures before the first step.
        weights: How much each source picture counts; None where all count alike.
        accelerator: The process's ``accelerate.Accelerator``.
    """

    job: Job
    head: BottleneckHead
    method: Method
    domain: DomainSettings
    settings: FinetuneSettings
    target: LabelledImages
    labelled: bool
    parameters: ParameterReport
    before: Pretrained
    weights: ImportanceWeights | None
    accelerator: Any

    @property
    def judged(self) -> LabelledImages:
        """The pictures that say how good the result is: the target's, or held-out ones of the source."""
        plain = self.job.validation.transform
        return self.target.with_transform(plain) if self.labelled else self.job.validation

    def take_apart(self) -> Adapting:
        """Build what is trained around the classifier."""
        job, heads = self.job, set(self.head.parameters())
        trains = any(p.requires_grad for p in job.model.parameters() if p not in heads)
        with seeded(derived_seed(job.training.seed, "domain classifier")):
            return take_apart(
                HeadOnly(self.head) if self.settings.cache_features else job.model,
                self.head,
                self.method,
                self.domain,
                self.before.domains(),
                job.training.total_steps(len(job.train)),
                body_trains=trains or job.unfreezing is not None,
            )


def prepare(
    domain: DomainSettings,
    settings: FinetuneSettings,
    training: TrainSettings,
    reporter: Reporter,
    images: Any = None,
) -> DomainJob:
    """Open the pictures of both domains, build the model and compute its features before adaptation.

    Args:
        domain: The target, and the method.
        settings: What is adapted; ``data`` and ``hidden`` are those of ``domain``.
        training: Hyper-parameters; ``lr`` and ``head_factor`` are those of ``settings``.
        reporter: Is told about the progress.
        images: Instead of ``domain.source``: anything that ``open_images`` takes.

    Raises:
        ValueError: Pictures, model, method or an option that don't fit, or too little memory.
        FileNotFoundError: There are no such pictures or weights.
        ImportError: accelerate is not installed.
    """
    method, accelerator = find_method(domain.method), make_accelerator(training.precision)
    settings = replace(settings, data=domain.source, hidden=domain.hidden)
    job = finetune.prepare(settings, training, reporter, images)
    target, labelled = _target(job, domain, settings, reporter)
    job.model.to(accelerator.device)
    assert isinstance(job.head, BottleneckHead)
    parameters = job.parameters()
    half = str(accelerator.mixed_precision) != "no"
    check_fits(parameters.training_bytes, accelerator.device, half=half)
    before = _pretrained(job, target, Path(settings.output), reporter, accelerator)
    source, others = before.domains()
    return DomainJob(
        job,
        job.head,
        method,
        domain,
        replace(settings, strategy=job.strategy.name, lr=job.training.lr),
        target,
        labelled,
        parameters,
        before,
        source_weights(domain.weighting, source, job.train.labels, others, seed=job.training.seed),
        accelerator,
    )


def _target(
    job: Job, domain: DomainSettings, settings: FinetuneSettings, reporter: Reporter
) -> tuple[LabelledImages, bool]:
    """The target's pictures that can be read, and whether they are labelled."""
    found, labelled = open_target(
        job.train,
        Path(domain.target),
        image_column=settings.image_column,
        label_column=settings.label_column,
    )

    def told(done: int, total: int) -> None:
        reporter.advance("check target", done, total, None)

    return readable(found, on_corrupt=settings.on_corrupt, on_done=told), labelled


def rows(images: LabelledImages) -> Tensor:
    """The features ``[n, F]`` that examples of a :class:`Pretrained` read."""
    assert isinstance(images.read, Rows)
    return images.read.features


def _pretrained(
    job: Job, target: LabelledImages, output: Path, reporter: Reporter, accelerator: Any
) -> Pretrained:
    plain = job.validation.transform
    parts = (part.with_transform(plain) for part in (job.train, job.validation, target))
    return Pretrained(*(frozen_features(job, part, output, reporter, accelerator) for part in parts))
