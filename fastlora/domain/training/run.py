"""Adapt a pretrained model to a second domain, and write all that is worth keeping of it."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
import torch
from matplotlib.figure import Figure

from fastlora._core.environment import environment
from fastlora._core.files import check_output_folder, write_file, write_report
from fastlora._core.progress import Reporter
from fastlora.domain.assessment import Readings
from fastlora.domain.training.build import Adapting
from fastlora.domain.training.embedding import Cloud, draw_embedding
from fastlora.domain.training.job import DomainJob, prepare, rows
from fastlora.domain.training.page import write_page
from fastlora.domain.training.records import DomainRecord
from fastlora.domain.training.settings import UNUSED, DomainSettings
from fastlora.domain.training.trainer import DomainTrainer, a_distance
from fastlora.transfer.finetune.evaluation import evaluate
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
from fastlora.transfer.report.style import png
from fastlora.transfer.training import TrainResult, TrainSettings
from fastlora.transfer.training.checks import check_unused
from fastlora.transfer.training.lock import sole_use

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
        training: Hyper-parameters; ``lr`` and ``head_factor`` are those of ``settings``.
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
        run = prepare(domain, settings, training, reporter, images)
        return _adapt(run, reporter, output, started, resume=resume)


def _adapt(
    run: DomainJob, reporter: Reporter, output: Path, started: float, *, resume: bool
) -> dict[str, Any]:
    adapting = run.take_apart()
    trainer = _trainer(run, adapting, output, reporter)
    result = trainer.fit(resume=resume)
    ended = report_of_ended(output, result, (CONFIG, PAGE, EMBEDDING))
    if ended is not None:
        reporter.note(f"this run is finished; nothing in {output} was changed")
        return ended
    readings = trainer.read()
    adapting.restore()
    job, judged = run.job, run.judged
    size = int(judged[0][0].shape[-1])
    files = save_run(
        output, job.model, job.strategy, run.settings, judged.classes, size, is_main=trainer.is_main
    )
    report = {
        **_record(run),
        **training_record(result),
        **_scores(run, result, readings),
        "files": files,
        "adapter_bytes": bytes_of_adapter(output),
        **environment(run.accelerator.device, str(run.accelerator.mixed_precision)),
        "total_seconds": time.perf_counter() - started,
    }
    if trainer.is_main:
        with reporting(output):
            write_file(output / CONFIG, tomli_w.dumps(report["config"]).encode())
            write_report(output / REPORT, report)
            figure = _embedding(run, readings)
            write_file(output / EMBEDDING, png(figure))
            write_page(output, report, judged, figure)
    return report


def _trainer(run: DomainJob, adapting: Adapting, output: Path, reporter: Reporter) -> DomainTrainer:
    job, before, target = run.job, run.before, run.target
    if run.settings.cache_features:
        source, held_out, others = before.train, before.validation, (before.target, before.target)
    else:
        source, held_out = job.train, job.validation
        others = target.with_transform(job.train.transform), target.with_transform(job.validation.transform)
    return DomainTrainer(
        adapting.paired,
        source,
        held_out,
        others,
        job.training,
        output=output,
        heads=adapting.heads,
        select=run.domain.select,
        target_is_labelled=run.labelled,
        weights=None if run.weights is None else torch.from_numpy(run.weights.weights).float(),
        unfreezing=job.unfreezing,
        configuration={"strategy": job.strategy.name} | run.settings.compared() | run.domain.compared(),
        reporter=reporter,
        accelerator=run.accelerator,
    )


def _record(run: DomainJob) -> dict[str, Any]:
    """What was adapted, to what and how."""
    config = as_config(run.settings, run.job.training) | asdict(run.domain)
    record = job_record(run.job)
    record["pictures"] |= {"target": len(run.target)}
    return {
        "model": run.settings.model,
        "dataset": f"{run.domain.source} to {run.domain.target}",
        "method": run.method.name,
        "method_title": run.method.title,
        "config": {name: value for name, value in sorted(config.items()) if name not in UNUSED},
        **record,
        "parameters": run.parameters.as_json(),
        "trainable_parameters": run.parameters.trainable_parameters,
        "total_parameters": run.parameters.total_parameters,
    }


def _scores(run: DomainJob, result: TrainResult, readings: Readings) -> dict[str, Any]:
    """How good the result is: on the target where it has labels, and on held-out source pictures."""
    scores = evaluate(readings.target_logits if run.labelled else readings.source_logits, run.judged)
    right = readings.source_logits.argmax(dim=1) == readings.source_labels
    seed = run.job.training.seed
    return {
        "accuracy": scores["accuracy"],
        "balanced_accuracy": scores["balanced_accuracy"],
        "evaluated_on": "target" if run.labelled else "validation",
        "evaluation": scores,
        "source_accuracy": float(right.double().mean()),
        "target": _oracles(result) if run.labelled else None,
        "a_distance": {
            "before": a_distance(*run.before.domains(), seed),
            "after": a_distance(readings.source_features, readings.target_features, seed),
        },
        "effective_sample_size": None if run.weights is None else run.weights.effective_sample_size,
    }


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


def _embedding(run: DomainJob, readings: Readings) -> Figure:
    """Both domains before and after, the target in its true classes where they are known."""
    predicted = readings.target_logits.argmax(dim=1)
    return draw_embedding(
        (
            Cloud("Before", rows(run.before.validation), rows(run.before.target)),
            Cloud("After", readings.source_features, readings.target_features),
        ),
        readings.source_labels,
        torch.tensor(run.target.labels) if run.labelled else predicted,
        run.job.train.classes,
        target_note="true classes" if run.labelled else "predicted classes",
        seed=run.job.training.seed,
    )
