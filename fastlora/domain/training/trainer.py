"""The training loop on batches of two domains."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.extras import require
from fastlora._core.progress import Reporter
from fastlora.domain.assessment import Readings, oracle, target_scores
from fastlora.domain.divergence import LEAST, proxy_a_distance
from fastlora.domain.methods import Domains
from fastlora.domain.methods.adversarial import domain_accuracy
from fastlora.domain.norms import use_domain
from fastlora.domain.training.paired import FeaturesAndLogits, PairedModel, PairedPart, paired
from fastlora.domain.training.records import DomainRecord
from fastlora.domain.training.settings import Select
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.training import Trainer, TrainSettings
from fastlora.transfer.training.batches import BatchPlan, Part
from fastlora.transfer.training.batching import leaves_one
from fastlora.transfer.training.fingerprint import hashed
from fastlora.transfer.training.prediction import predict
from fastlora.transfer.training.randomness import derived_seed, seeded
from fastlora.transfer.unfreezing import GradualUnfreezing

# five splits of this many examples of each domain are judged in a second
_JUDGED = 400


class DomainTrainer(Trainer):
    """A :class:`Trainer` whose every step sees a batch of the source and one of the target.

    An epoch is a pass over the source; batches are always full, filled with the first examples of the epoch;
    a batch with one example of its own is left out.
    Checkpoints, resuming to the bit, accumulation and several processes are the trainer's own. The method's
    term is computed in each part of a batch, and the mean over the parts counts.

    Args:
        model: To train; its ``model`` keeps what was learnt.
        source: Labelled, with the training transform.
        validation: Held-out source pictures, with the evaluation transform.
        target: The pair of the target's pictures with the training and with the evaluation transform; labels
            are never trained on.
        settings: Hyper-parameters, without mixup.
        output: Folder for checkpoints and logs.
        heads: What is trained beside the body's stages, at the head's rate.
        select: What chooses the epoch to keep.
        target_is_labelled: Whether the target's labels are true, to show how good the model is.
        weights: How much each source picture counts, float32 ``[n]`` of mean 1.
        unfreezing: When stages begin to train.
        configuration: What a resumed run must share beside settings and data; None for nothing more.
        reporter: Is told about the progress.
        accelerator: An ``accelerate.Accelerator``; None makes one for the settings' precision.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: Mixup, sharding, fewer than 8 held-out or target pictures, or a batch that does not
            divide into parts.
    """

    model: PairedModel
    _record_kind = DomainRecord

    def __init__(
        self,
        model: PairedModel,
        source: LabelledImages,
        validation: LabelledImages,
        target: tuple[LabelledImages, LabelledImages],
        settings: TrainSettings,
        *,
        output: Path,
        heads: nn.ModuleList,
        select: Select = "last",
        target_is_labelled: bool = False,
        weights: Tensor | None = None,
        unfreezing: GradualUnfreezing | None = None,
        configuration: Mapping[str, Any] | None = None,
        reporter: Reporter | None = None,
        accelerator: Any = None,
    ) -> None:
        """See the class."""
        require("sklearn", distribution="scikit-learn", purpose="domain adaptation", extra="domain")
        seen, judged = target
        _check(settings, len(validation), len(seen))
        super().__init__(
            model,
            source,
            validation,
            settings,
            output=output,
            unfreezing=unfreezing,
            head=heads,
            configuration={**(configuration or {}), **_compared(seen, settings, weights)},
            reporter=reporter,
            accelerator=accelerator,
        )
        _check_parts(settings, self.accelerator.num_processes)
        self._monitor, self._target, self._target_is_labelled = select, judged, target_is_labelled
        self._plan = BatchPlan.of(source, settings, self.accelerator, full=True, weights=weights)
        seed = derived_seed(settings.seed, "target")
        self._target_plan = BatchPlan.of(seen, settings, self.accelerator, seed=seed, full=True)

    def read(self) -> Readings:
        """What the model makes of the held-out source pictures and the target, without gradients."""
        with use_domain(self.model, "source"):
            source = self._seen(self._validation)
        with use_domain(self.model, "target"):
            target = self._seen(self._target)
        truth = torch.tensor(self._target.labels) if self._target_is_labelled else None
        return Readings(*source, torch.tensor(self._validation.labels), *target, truth)

    def _seen(self, images: LabelledImages) -> tuple[Tensor, Tensor]:
        settings, both = self._settings, FeaturesAndLogits(self.model.model)
        found = predict(both, images, settings.batch_size, settings.workers, self.accelerator)
        classes = len(images.classes)
        return found[:, :-classes], found[:, -classes:]

    def _load(self, epoch: int, first: int) -> Iterator[Sequence[Part]]:
        steps, workers = self._settings.steps_per_epoch(len(self._target)), self._settings.workers
        source = self._plan.load(epoch, first, workers)
        return paired(source, self._target_plan, self._progress.step, steps, workers)

    def _part_loss(self, part: Part, share: float, weight: float) -> Tensor:
        assert isinstance(part, PairedPart)
        device = self.accelerator.device
        logits, term = self._engine.forward((part.inputs.to(device), part.target.to(device)))
        losses = self._loss.sum(logits.float(), part.labels.to(device), part.counted.to(device), share)
        pieces = self.accelerator.num_processes * self._settings.accumulation
        total: Tensor = losses + term * (weight / pieces)
        return total

    def _step(self, parts: Sequence[Part], epoch: int, indices: Sequence[int]) -> None:
        super()._step(parts, epoch, indices)
        self.model.schedule.advance()

    def _record(self, epoch: int) -> DomainRecord:
        # what judges draws from generators of its own, or a resumed run would end with others
        with seeded(derived_seed(self._settings.seed, "judge", epoch)):
            return self._judged(epoch, self.read())

    def _judged(self, epoch: int, readings: Readings) -> DomainRecord:
        accuracy, balanced = oracle(readings)
        scores: dict[str, Any] = target_scores(readings)
        return DomainRecord(
            **self._figures(epoch, readings.source_logits),
            target_accuracy=accuracy,
            target_balanced_accuracy=balanced,
            domain_accuracy=self._domain_accuracy(readings),
            strength=self.model.schedule().item(),
            a_distance=a_distance(readings.source_features, readings.target_features, self._settings.seed),
            **scores,
        )

    def _domain_accuracy(self, readings: Readings) -> float | None:
        device = self.accelerator.device
        domains = Domains(
            readings.source_features.to(device),
            readings.target_features.to(device),
            readings.source_logits.to(device),
            readings.target_logits.to(device),
        )
        logits = self.model.domain_logits(domains)
        return None if logits is None else float(domain_accuracy(logits, domains.is_target()))


def a_distance(source: Tensor, target: Tensor, seed: int) -> float:
    """Proxy A-distance of some hundred features of each domain, drawn by a seed."""
    return proxy_a_distance(_some(source, seed), _some(target, seed), seed=seed, warn=False).value


def _some(features: Tensor, seed: int) -> Tensor:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[order[:_JUDGED]]


def _check(settings: TrainSettings, validation: int, target: int) -> None:
    if settings.mixup:
        raise ValueError(
            f"expected mixup=0 for domain adaptation, got {settings.mixup}; what is mixed has no domain"
        )
    if settings.sharding != "ddp":
        raise ValueError(f"expected sharding='ddp' for domain adaptation, got {settings.sharding!r}")
    if min(validation, target) < LEAST:
        raise ValueError(
            f"expected at least {LEAST} held-out pictures of the source and as many of the target, to judge "
            f"every epoch by, got {validation} and {target}; hold more out (--validation-share)"
        )


def _check_parts(settings: TrainSettings, processes: int) -> None:
    parts = processes * settings.accumulation
    if settings.batch_size % parts:
        raise ValueError(
            f"expected batch_size as a multiple of {parts} for {processes} processes with accumulation "
            f"{settings.accumulation}, got {settings.batch_size}; an alignment must see no example twice"
        )


def _compared(seen: LabelledImages, settings: TrainSettings, weights: Tensor | None) -> dict[str, Any]:
    """What a resumed run must share beside what every run must."""
    compared = {"target_data": hashed([seen.names]), "source_weights": _digits(weights)}
    if leaves_one(len(seen), settings.batch_size):
        # another version of fastlora filled the last batch up
        compared["target_last_batch"] = "left out"
    return compared


def _digits(weights: Tensor | None) -> str | None:
    # a few digits: what is recomputed on another machine may differ in the last ones
    return None if weights is None else hashed([f"{weight:.4f}" for weight in weights.tolist()])
