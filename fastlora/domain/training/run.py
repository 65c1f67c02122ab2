"""Adapt a pretrained model to a second domain, and write all that is worth keeping of it."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastlora._core.environment import environment
from fastlora._core.files import check_output_folder, write_file, write_report
from fastlora._core.memory import check_fits
from fastlora._core.progress import Reporter
from fastlora.domain.assessment import Readings
from fastlora.domain.pictures import open_target
from fastlora.domain.registry import Method, find_method
from fastlora.domain.training.build import Adapting, take_apart
from fastlora.domain.training.embedding import Cloud, draw_embedding
from fastlora.domain.training.page import write_page
from fastlora.domain.training.records import DomainRecord
from fastlora.domain.training.settings import UNUSED, DomainSettings
from fastlora.domain.training.trainer import DomainTrainer, a_distance
from fastlora.domain.weighting import ImportanceWeights, source_weights
from fastlora.parameters import ParameterReport
from fastlora.transfer.data import LabelledImages, readable
from fastlora.transfer.finetune.cached import HeadOnly, Rows
from fastlora.transfer.finetune.evaluation import evaluate
from fastlora.transfer.finetune.job import Job, prepare
from fastlora.transfer.finetune.page import PAGE
from fastlora.transfer.finetune.record import (
    REPORT,
    bytes_of_adapter,
    job_record,
    report_of_ended,
    reporting,
    training_record,
)
from fastlora.transfer.finetune.run import CONFIG
from fastlora.transfer.finetune.saved import save_run
from fastlora.transfer.finetune.settings import FinetuneSettings, as_config
from fastlora.transfer.finetune.view import frozen_features
from fastlora.transfer.models.heads import BottleneckHead
from fastlora.transfer.report.style import png
from fastlora.transfer.training import TrainResult, TrainSettings
from fastlora.transfer.training.checks import check_unused
from fastlora.transfer.training.device import make_accelerator
from fastlora.transfer.training.lock import sole_use
from fastlora.transfer.training.randomness import derived_seed, seeded

EMBEDDING = "embedding.png"


def adapt(
    domain: DomainSettings,
    settings: FinetuneSettings,
    training: TrainSettings,
    reporter: Reporter,
    *,
    images: Any = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Adapt a pretrained model from labelled pictures to another domain's without labels.

    Writes what :func:`fastlora.transfer.finetune.finetune` writes, and ``embedding.png``.

    Args:
        domain: The target, and the method.
        settings: What is adapted; ``data`` and ``hidden`` are those of ``domain``.
        training: How; ``lr`` and ``head_factor`` are those of ``settings``.
        reporter: Is told about the progress.
        images: Instead of ``domain.source``: anything that ``open_images`` takes.
        resume: Go on with the run that ``settings.output`` holds; nothing is changed in a finished one.

    Returns:
        What ``report.json`` holds; of a run that was finished before with ``"unchanged": True`` beside it.

    Raises:
        ValueError: Something doesn't fit, such as class folders of the target that the source has not;
            another run writes to ``settings.output``, or it holds one that is not to be resumed.
        FileNotFoundError: There are no such pictures or weights.
        FloatingPointError: The loss is no longer finite.
        ImportError: scikit-learn or accelerate is not installed.
        OSError: The disk is full; the checkpoints before stay.
        ReportError: The report can't be written; the model is saved.
        Interrupted: Ctrl-C or SIGTERM; see :meth:`fastlora.transfer.training.Trainer.fit`.
    """
    started, output = time.perf_counter(), Path(settings.output)
    check_output_folder(output)
    with sole_use(output):
        check_unused(output, resume=resume)
        run = _prepare(domain, settings, training, reporter, images)
        return _adapt(run, reporter, output, started, resume=resume)


def _adapt(run: "_Run", reporter: Reporter, output: Path, started: float, *, resume: bool) -> dict[str, Any]:
    parameters = run.job.parameters()
    half = str(run.accelerator.mixed_precision) != "no"
    check_fits(parameters.training_bytes, run.accelerator.device, half=half)
    before = run.pretrained(reporter)
    weights = run.weights(before)
    adapting = run.take_apart(before)
    trainer = run.trainer(adapting, before, weights, reporter)
    result = trainer.fit(resume=resume)
    ended = report_of_ended(output, result, (CONFIG, PAGE, EMBEDDING))
    if ended is not None:
        reporter.note(f"this run is finished; nothing in {output} was changed")
        return ended
    readings = trainer.read()
    adapting.restore()
    judged = run.judged()
    size = int(judged[0][0].shape[-1])
    files = save_run(
        output, run.job.model, run.job.strategy, run.settings, judged.classes, size, is_main=trainer.is_main
    )
    report = {
        **run.record(),
        **_parameter_record(parameters),
        **training_record(result),
        **run.scores(result, readings, before),
        "effective_sample_size": None if weights is None else weights.effective_sample_size,
        "files": files,
        "adapter_bytes": bytes_of_adapter(output),
        **environment(trainer.accelerator.device, str(trainer.accelerator.mixed_precision)),
        "total_seconds": time.perf_counter() - started,
    }
    if trainer.is_main:
        with reporting(output):
            write_file(output / CONFIG, tomli_w.dumps(report["config"]).encode())
            write_report(output / REPORT, report)
            figure = run.embedding(before, readings)
            write_file(output / EMBEDDING, png(figure))
            write_page(output, report, judged, figure)
    return report


@dataclass(frozen=True)
class _Pretrained:
    """What the pretrained model's head reads, as examples that can be trained on."""

    train: LabelledImages
    validation: LabelledImages
    target: LabelledImages

    def domains(self) -> tuple[Tensor, Tensor]:
        return _rows(self.train), _rows(self.target)


@dataclass(frozen=True)
class _Run:
    """Everything an adaptation needs, made and checked before the first step."""

    job: Job
    head: BottleneckHead
    method: Method
    domain: DomainSettings
    settings: FinetuneSettings
    target: LabelledImages
    labelled: bool
    accelerator: Any

    def pretrained(self, reporter: Reporter) -> _Pretrained:
        output, plain = Path(self.settings.output), self.job.validation.transform
        parts = (self.job.train, self.job.validation, self.target)
        return _Pretrained(
            *(frozen_features(self.job, part.with_transform(plain), output, reporter) for part in parts)
        )

    def weights(self, before: _Pretrained) -> ImportanceWeights | None:
        source, target = before.domains()
        labels = self.job.train.labels
        return source_weights(self.domain.weighting, source, labels, target, seed=self.job.training.seed)

    def take_apart(self, before: _Pretrained) -> Adapting:
        job, heads = self.job, set(self.head.parameters())
        trains = any(p.requires_grad for p in job.model.parameters() if p not in heads)
        with seeded(derived_seed(job.training.seed, "domain classifier")):
            return take_apart(
                HeadOnly(self.head) if self.settings.cache_features else job.model,
                self.head,
                self.method,
                self.domain,
                before.domains(),
                job.training.total_steps(len(job.train)),
                body_trains=trains or job.unfreezing is not None,
            )

    def trainer(
        self, adapting: Adapting, before: _Pretrained, weights: ImportanceWeights | None, reporter: Reporter
    ) -> DomainTrainer:
        job, cached = self.job, self.settings.cache_features
        plain = job.validation.transform
        pictures = self.target.with_transform(job.train.transform), self.target.with_transform(plain)
        compared = self.settings.compared() | self.domain.compared()
        return DomainTrainer(
            adapting.paired,
            before.train if cached else job.train,
            before.validation if cached else job.validation,
            (before.target, before.target) if cached else pictures,
            job.training,
            output=Path(self.settings.output),
            heads=adapting.heads,
            select=self.domain.select,
            target_is_labelled=self.labelled,
            weights=None if weights is None else torch.from_numpy(weights.weights).float(),
            unfreezing=job.unfreezing,
            configuration={"strategy": job.strategy.name, **compared},
            reporter=reporter,
            accelerator=self.accelerator,
        )

    def judged(self) -> LabelledImages:
        plain = self.job.validation.transform
        return self.target.with_transform(plain) if self.labelled else self.job.validation

    def record(self) -> dict[str, Any]:
        job = self.job
        record = {
            "model": self.settings.model,
            "dataset": f"{self.domain.source} to {self.domain.target}",
            "method": self.method.name,
            "method_title": self.method.title,
            "config": _config(self.settings, job.training, self.domain),
            **job_record(job),
        }
        record["pictures"] |= {"target": len(self.target)}
        return record

    def scores(self, result: TrainResult, readings: Readings, before: _Pretrained) -> dict[str, Any]:
        scores = evaluate(readings.target_logits if self.labelled else readings.source_logits, self.judged())
        seed = self.job.training.seed
        right = readings.source_logits.argmax(dim=1) == readings.source_labels
        return {
            "accuracy": scores["accuracy"],
            "balanced_accuracy": scores["balanced_accuracy"],
            "evaluated_on": "target" if self.labelled else "validation",
            "evaluation": scores,
            "source_accuracy": float(right.double().mean()),
            "target": _oracles(result) if self.labelled else None,
            "a_distance": {
                "before": a_distance(*before.domains(), seed),
                "after": a_distance(readings.source_features, readings.target_features, seed),
            },
        }

    def embedding(self, before: _Pretrained, readings: Readings) -> Figure:
        known, predicted = torch.tensor(self.target.labels), readings.target_logits.argmax(dim=1)
        return draw_embedding(
            (
                Cloud("Before", _rows(before.validation), _rows(before.target)),
                Cloud("After", readings.source_features, readings.target_features),
            ),
            readings.source_labels,
            known if self.labelled else predicted,
            self.job.train.classes,
            target_note="true classes" if self.labelled else "predicted classes",
            seed=self.job.training.seed,
        )


def _prepare(
    domain: DomainSettings,
    settings: FinetuneSettings,
    training: TrainSettings,
    reporter: Reporter,
    images: Any,
) -> _Run:
    method, accelerator = find_method(domain.method), make_accelerator(training.precision)
    settings = replace(settings, data=domain.source, hidden=domain.hidden)
    job = prepare(settings, training, reporter, images)
    found, labelled = open_target(job.train, Path(domain.target))
    target = readable(
        found,
        on_corrupt=settings.on_corrupt,
        on_done=lambda done, total: reporter.advance("check target", done, total, None),
    )
    job.model.to(accelerator.device)
    assert isinstance(job.head, BottleneckHead)
    settings = replace(settings, strategy=job.strategy.name, lr=job.training.lr)
    return _Run(job, job.head, method, domain, settings, target, labelled, accelerator)


def _oracles(result: TrainResult) -> dict[str, dict[str, Any]]:
    """What target labels say of the kept epoch, the last one, and the best by these very labels."""
    history = [record for record in result.history if isinstance(record, DomainRecord)]
    chosen = {
        "kept": history[result.best_epoch - 1],
        "last": history[-1],
        "oracle": max(history, key=lambda record: record.target_accuracy or 0.0),
    }
    return {
        name: {
            "epoch": record.epoch,
            "accuracy": record.target_accuracy,
            "balanced_accuracy": record.target_balanced_accuracy,
        }
        for name, record in chosen.items()
    }


def _config(settings: FinetuneSettings, training: TrainSettings, domain: DomainSettings) -> dict[str, Any]:
    table = as_config(settings, training) | asdict(domain)
    return {name: value for name, value in sorted(table.items()) if name not in UNUSED}


def _parameter_record(report: ParameterReport) -> dict[str, Any]:
    return {
        "parameters": report.as_json(),
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
    }


def _rows(images: LabelledImages) -> Tensor:
    assert isinstance(images.read, Rows)
    return images.read.features
