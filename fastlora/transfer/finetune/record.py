"""What ``report.json`` says of a run, apart from its scores."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastlora.transfer.finetune.job import Job
from fastlora.transfer.finetune.saved import ADAPTER
from fastlora.transfer.training import TrainResult


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
