"""The demo's pictures, and the training of each method on them."""

import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from fastlora._core import backend
from fastlora._core.progress import Reporter
from fastlora.parameters import ParameterReport, parameter_report
from fastlora.state.save import save_adapter
from fastlora.transfer.data.bundled import Splits
from fastlora.transfer.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Transform
from fastlora.transfer.demo.methods import Method
from fastlora.transfer.finetune.evaluation import evaluate
from fastlora.transfer.finetune.job import prepare
from fastlora.transfer.finetune.record import training_record
from fastlora.transfer.finetune.run import Run, begin
from fastlora.transfer.finetune.settings import FinetuneSettings, as_config
from fastlora.transfer.models.names import DINOV2
from fastlora.transfer.training import TrainResult, TrainSettings
from fastlora.transfer.training.device import make_accelerator

EAGER = "LoRA, eager reference"
_EAGER_EPOCHS = 2
_SCORES = ("accuracy", "accuracy_standard_error", "accuracy_interval", "balanced_accuracy", "confusion")


@dataclass(frozen=True)
class Study:
    """What all methods share.

    Attributes:
        parts: The pictures.
        image_size: Height and width in pixels that the model sees.
        training: Hyper-parameters of the methods that have none of their own.
        reporter: Is told about the progress.
        output: Folder for what was trained.
    """

    parts: Splits
    image_size: int
    training: TrainSettings
    reporter: Reporter
    output: Path

    def train(self, method: Method) -> dict[str, Any]:
        """Train and test a method, and save what was trained.

        Args:
            method: Which one.

        Returns:
            What ``report.json`` says of it.
        """
        with self._folder() as folder:
            run = self._begin(method, folder, method.title)
            return self._record(method, run, run.trainer.fit())

    def train_beside_eager(self, method: Method) -> tuple[dict[str, Any], dict[str, Any]]:
        """Train and test a method of fused layers, and its first two epochs again with the eager formula.

        Both do the same steps on the same batches and take turns, an epoch each, so that whatever else the
        machine does slows both down alike. While they do, both models are in memory.

        Args:
            method: Which one.

        Returns:
            What ``report.json`` says of the method, and of the comparison.
        """
        with self._folder() as folder, self._folder() as other:
            fused = self._begin(method, folder, method.title)
            eager = self._begin(method, other, EAGER, epochs=_EAGER_EPOCHS)
            with contextlib.closing(eager.trainer.epochs()) as turns:
                for record in fused.trainer.epochs():
                    if record.epoch <= _EAGER_EPOCHS:
                        with backend.use_backend("reference"):
                            next(turns)
            trained = self._record(method, fused, fused.trainer.result())
        return trained, _compared(trained["seconds"], fused, eager)

    def _folder(self) -> "tempfile.TemporaryDirectory[str]":
        # of what a run writes, the demo keeps the adapter alone; a killed one leaves nothing in its output
        return tempfile.TemporaryDirectory(prefix="fastlora-demo-")

    def _begin(self, method: Method, folder: str, title: str, epochs: int | None = None) -> Run:
        settings = FinetuneSettings(
            data=self.parts.train.name,
            output=folder,
            model=DINOV2,
            strategy=method.strategy,
            image_size=self.image_size,
            **method.settings,
        )
        training = TrainSettings(**asdict(self.training) | dict(method.training))
        most = None if epochs is None else epochs * training.steps_per_epoch(len(self.parts.train))
        images = {"train": self.parts.train.labelled(), "val": self.parts.validation.labelled()}
        titled = _Titled(self.reporter, title, most)
        job = prepare(settings, training, titled, images, self.parts.test.labelled())
        varied, plain = transforms(self.parts.train.flip_dims)
        assert job.test is not None
        job = replace(
            job,
            train=job.train.with_transform(plain if settings.cache_features else varied),
            validation=job.validation.with_transform(plain),
            test=job.test.with_transform(plain),
        )
        # nobody could resume it
        return begin(job, settings, make_accelerator(training.precision), titled, checkpoints=False)

    def _record(self, method: Method, run: Run, result: TrainResult) -> dict[str, Any]:
        test, parameters = run.job.test, parameter_report(run.job.model)
        assert test is not None
        scores = evaluate(run.trainer.predict(run.view(test)), test)
        peaks = [peak for peak in (run.memory.bytes, result.peak_memory_bytes) if peak is not None]
        return {
            "strategy": method.strategy,
            "title": method.title,
            "trainable_parameters": parameters.trainable_parameters,
            "total_parameters": parameters.total_parameters,
            "trainable_percent": parameters.trainable_percent,
            **{name: scores[name] for name in _SCORES},
            "validation_accuracy": result.history[-1].accuracy,
            **training_record(result),
            "seconds": run.feature_seconds + result.seconds,
            "peak_memory_bytes": max(peaks, default=None),
            **self._save(method, run, parameters),
            "hyper_parameters": _hyper_parameters(method, run),
        }

    def _save(self, method: Method, run: Run, parameters: ParameterReport) -> dict[str, Any]:
        if method.folder is None:
            # nobody needs the file; it would be as large as the gradients of what trains
            return {"adapter_bytes": parameters.gradient_bytes, "adapter_folder": None}
        folder = save_adapter(run.job.model, self.output / method.folder)
        size = (folder / "adapter_model.safetensors").stat().st_size
        return {"adapter_bytes": size, "adapter_folder": folder.name}


@dataclass(frozen=True)
class _Titled:
    """Tells of a run's training, which ends after ``most`` steps, and of its features under a title."""

    reporter: Reporter
    title: str
    most: int | None

    def note(self, text: str) -> None:
        self.reporter.note(text)

    def advance(
        self, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        if task == "train":
            self.reporter.advance(self.title, done, min(total, self.most or total), loss, memory)
        elif task.startswith("features"):
            self.reporter.advance(f"{self.title}: {task}", done, total, loss, memory)


def transforms(flip_dims: Sequence[int]) -> tuple[Transform, Transform]:
    """What pictures of the right size pass through, in training and in evaluation.

    All of a picture is seen: defects at the border of a solar cell count, and no digit is cut.

    Args:
        flip_dims: Dimensions along which a picture may be mirrored without changing its label: -1, -2.
    """
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    mirrors = {-1: v2.RandomHorizontalFlip(), -2: v2.RandomVerticalFlip()}
    return v2.Compose([*(mirrors[dim] for dim in flip_dims), *finish]), v2.Compose(finish)


def _compared(seconds: float, fused: Run, eager: Run) -> dict[str, Any]:
    result, steps = eager.trainer.result(), len(eager.trainer.step_seconds)
    ours, theirs = (statistics.median(run.trainer.step_seconds[:steps]) for run in (fused, eager))
    return {
        "title": EAGER,
        "steps_measured": steps,
        "fused_step_seconds": ours,
        "eager_step_seconds": theirs,
        "eager_over_fused": theirs / ours,
        "projected_seconds": seconds * theirs / ours,
        "peak_memory_bytes": result.peak_memory_bytes,
        "epochs": training_record(result)["epochs"],
    }


def _hyper_parameters(method: Method, run: Run) -> dict[str, Any]:
    config = as_config(run.settings, run.job.training)
    own = {name: value for name, value in config.items() if name not in ("data", "output")}
    if not method.fused:
        return own
    return own | {"backend": backend.resolve(run.trainer.accelerator.device, torch.float32)}
