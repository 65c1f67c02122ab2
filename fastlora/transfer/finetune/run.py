"""Fine-tune a model and write all that is worth keeping of it."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from fastlora._core.environment import environment
from fastlora._core.files import check_output_folder, write_file, write_report
from fastlora._core.memory import PeakMemory, check_fits
from fastlora._core.progress import Reporter
from fastlora.parameters import ParameterReport
from fastlora.transfer.finetune.cached import HeadOnly
from fastlora.transfer.finetune.evaluation import evaluate
from fastlora.transfer.finetune.job import Job, prepare
from fastlora.transfer.finetune.page import PAGE, write_page
from fastlora.transfer.finetune.record import (
    REPORT,
    bytes_of_adapter,
    job_record,
    report_of_ended,
    reporting,
    training_record,
)
from fastlora.transfer.finetune.saved import save_run
from fastlora.transfer.finetune.settings import FinetuneSettings, as_config
from fastlora.transfer.finetune.view import View, view_of
from fastlora.transfer.training import Trainer, TrainResult, TrainSettings
from fastlora.transfer.training.checks import check_unused
from fastlora.transfer.training.device import make_accelerator
from fastlora.transfer.training.lock import sole_use

CONFIG = "config.toml"


def finetune(
    settings: FinetuneSettings,
    training: TrainSettings,
    reporter: Reporter,
    *,
    images: Any = None,
    test_images: Any = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tune a model on labelled pictures.

    Writes into ``settings.output``: the model (``adapter/`` or ``model.safetensors``, and ``model.json``),
    ``report.json``, ``report.html``, ``config.toml``, ``epochs.csv``, ``steps.csv``, ``tensorboard/`` and
    ``checkpoints/``.

    Args:
        settings: What to fine-tune, and on what.
        training: Hyper-parameters; ``lr`` and ``head_factor`` are those of ``settings``.
        reporter: Is told about the progress.
        images: Instead of ``settings.data``: anything that ``open_images`` takes.
        test_images: Instead of ``settings.test``: anything that ``open_images`` takes.
        resume: Go on with the run that ``settings.output`` holds; nothing is changed in a finished one.

    Returns:
        What ``report.json`` holds; of a run that was finished before with ``"unchanged": True`` beside it.

    Raises:
        ValueError: Something doesn't fit, another run writes to ``settings.output``, or it holds one that is
            not to be resumed; see :func:`prepare` and :class:`Trainer`.
        FileNotFoundError: There are no such pictures or weights.
        FloatingPointError: The loss is no longer finite.
        OSError: The disk is full; the checkpoints before stay.
        ReportError: The report can't be written; the model is saved.
        Interrupted: Ctrl-C or SIGTERM; see :meth:`Trainer.fit`.
    """
    output = Path(settings.output)
    check_output_folder(output)
    with sole_use(output):
        check_unused(output, resume=resume)
        started = time.perf_counter()
        accelerator = make_accelerator(training.precision)
        job = prepare(settings, training, reporter, images, test_images)
        parameters = job.parameters()
        half = str(accelerator.mixed_precision) != "no"
        check_fits(parameters.training_bytes, accelerator.device, half=half)
        run = begin(job, settings, accelerator, reporter)
        result = run.trainer.fit(resume=resume)
        ended = report_of_ended(output, result, (CONFIG, PAGE))
        if ended is not None:
            reporter.note(f"this run is finished; nothing in {output} was changed")
            return ended
        return _finish(run, result, parameters, started)


@dataclass(frozen=True)
class Run:
    """A fine-tuning that can begin, or has ended.

    Attributes:
        settings: What is fine-tuned, and on what.
        job: The model and its pictures.
        view: From pictures to what the trained part sees of them.
        trainer: What trains it.
        feature_seconds: What computing the training pictures' features took, where they are cached.
        memory: Peak memory of computing these features.
    """

    settings: FinetuneSettings
    job: Job
    view: View
    trainer: Trainer
    feature_seconds: float
    memory: PeakMemory


def begin(
    job: Job, settings: FinetuneSettings, accelerator: Any, reporter: Reporter, *, checkpoints: bool = True
) -> Run:
    """Put a job on its device, compute its features if they are cached, and make its trainer.

    Args:
        job: Everything that is trained, and trained on.
        settings: What the job was made of; ``output`` is the folder that the trainer writes to.
        accelerator: An ``accelerate.Accelerator``.
        reporter: Is told about the progress.
        checkpoints: Whether the trainer writes any.

    Raises:
        ValueError: Nothing trains, or a batch has fewer examples than processes.
    """
    output = Path(settings.output)
    # cached features are computed there too
    job.model.to(accelerator.device)
    view = view_of(job, settings, output, reporter, accelerator)
    started, memory = time.perf_counter(), PeakMemory(accelerator.device)
    with memory:
        train = view(job.train)
    feature_seconds = time.perf_counter() - started
    trainer = Trainer(
        HeadOnly(job.head) if settings.cache_features else job.model,
        train,
        view(job.validation),
        job.training,
        output=output,
        unfreezing=job.unfreezing,
        configuration={"strategy": job.strategy.name, **settings.compared()},
        reporter=reporter,
        checkpoints=checkpoints,
        accelerator=accelerator,
    )
    return Run(settings, job, view, trainer, feature_seconds, memory)


def _finish(run: Run, result: TrainResult, parameters: ParameterReport, started: float) -> dict[str, Any]:
    """Write the model and the report, and return the report."""
    settings, job, trainer = run.settings, run.job, run.trainer
    accelerator, output = trainer.accelerator, Path(settings.output)
    judged = job.validation if job.test is None else job.test
    is_main, size = trainer.is_main, int(judged[0][0].shape[-1])
    # before anything is made of it that may fail
    files = save_run(output, job.model, job.strategy, settings, judged.classes, size, is_main=is_main)
    scores = evaluate(trainer.predict(run.view(judged)), judged)
    report = {
        "model": settings.model,
        "dataset": settings.data,
        "config": as_config(replace(settings, strategy=job.strategy.name, lr=job.training.lr), job.training),
        **job_record(job),
        "parameters": parameters.as_json(),
        "trainable_parameters": parameters.trainable_parameters,
        "total_parameters": parameters.total_parameters,
        **training_record(result),
        "accuracy": scores["accuracy"],
        "balanced_accuracy": scores["balanced_accuracy"],
        "evaluated_on": "validation" if job.test is None else "test",
        "evaluation": scores,
        "files": files,
        "adapter_bytes": bytes_of_adapter(output),
        **environment(accelerator.device, str(accelerator.mixed_precision)),
        "total_seconds": time.perf_counter() - started,
    }
    if is_main:
        with reporting(output):
            write_file(output / CONFIG, tomli_w.dumps(report["config"]).encode())
            write_report(output / REPORT, report)
            write_page(output, report, judged)
    return report
