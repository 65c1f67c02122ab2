"""What ``report.json`` says of a run, apart from its scores."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastlora._core.files import read_json
from fastlora.transfer.finetune.description import ADAPTER, read_description
from fastlora.transfer.finetune.job import Job
from fastlora.transfer.training import TrainResult

REPORT = "report.json"


class ReportError(OSError):
    """What a run trained is saved, but not all that is told about it could be written."""


@contextlib.contextmanager
def reporting(output: Path) -> Iterator[None]:
    """Where the report of a finished run is written.

    Raises:
        ReportError: Something failed inside; it says that the model is not lost.
    """
    try:
        yield
    except OSError:
        # of the disk, and says so itself
        raise
    except Exception as error:
        raise ReportError(
            f"the trained model is saved in {output}, but its report can't be written: "
            f"{type(error).__name__}: {error}"
        ) from error


def job_record(job: Job) -> dict[str, Any]:
    """What was trained, on what, and what is advised."""
    return {
        "strategy": job.strategy.name,
        "strategy_summary": job.strategy.summary,
        "seed": job.training.seed,
        "recommendation": asdict(job.recommendation),
        "pictures": {
            "train": len(job.train),
            "validation": len(job.validation),
            "test": 0 if job.test is None else len(job.test),
        },
        "classes": list(job.train.classes),
    }


def report_of_ended(output: Path, result: TrainResult, files: Sequence[str]) -> dict[str, Any] | None:
    """The report of a run that had come to its end before; None where something of its end is missing.

    Args:
        output: Folder of the run.
        result: What its trainer says.
        files: Beside the model, what a run ends with.
    """
    if result.resumed_at != result.steps:
        return None
    try:
        report = read_json(output / REPORT)
        read_description(output)
    except (OSError, ValueError):
        # damaged since: the end is written again
        return None
    written = report.get("files") if isinstance(report, dict) else None
    whole = isinstance(written, list) and all((output / str(name)).exists() for name in [*written, *files])
    return {**report, "unchanged": True} if whole else None


def bytes_of_adapter(output: Path) -> int | None:
    """Size of the adapter file, if there is one."""
    path = output / ADAPTER / "adapter_model.safetensors"
    return path.stat().st_size if path.is_file() else None


def training_record(result: TrainResult) -> dict[str, Any]:
    """How the training went."""
    return {
        "epochs": [asdict(record) for record in result.history],
        "best_epoch": result.best_epoch,
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "resumed_at": result.resumed_at,
    }
