"""Adapt a classifier on features that are computed once: seconds on a CPU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora._core.option_checks import check_count, check_number, check_positive
from fastlora.domain._features import both, known_labels, source_labels_of, standardise
from fastlora.domain.assessment import Readings, oracle, target_scores
from fastlora.domain.methods.adversarial import domain_accuracy
from fastlora.domain.model import DomainAdaptationModel
from fastlora.domain.registry import METHODS, Method, domain_head, find_method
from fastlora.domain.weighting import ImportanceWeights, Weighting, source_weights
from fastlora.nn.gradient_reversal import ReversalSchedule
from fastlora.transfer.data import stratified_split
from fastlora.transfer.training.randomness import derived_seed, seeded

__all__ = ["METHODS", "AdaptEpoch", "AdaptResult", "AdaptSettings", "adapt_features"]


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """Hyper-parameters of an adaptation on features.

    Attributes:
        epochs: Passes over the larger domain.
        batch_size: Examples of each domain in a step.
        hidden: Width of the layer that learns domain-independent features.
        lr: AdamW's rate.
        weight_decay: AdamW's.
        strength: What the schedule's λ goes towards: the reversal's, or the weight of other terms.
        gamma: How early λ rises.
        weighting: How the source's examples are weighted (:func:`fastlora.domain.weighting.source_weights`).
        held_out: Share of the source that is not trained on, for the scores to select by.
        seed: Seed of initial weights, order and split.

    Raises:
        ValueError: A number out of range or an unknown weighting.
    """

    epochs: int = 30
    batch_size: int = 64
    hidden: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-3
    strength: float = 1.0
    gamma: float = 10.0
    weighting: Weighting = "none"
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("epochs", "batch_size", "hidden"):
            check_count(name, getattr(self, name), "leave it out for the usual")
        for name in ("lr", "strength", "gamma"):
            check_positive(name, getattr(self, name), "leave it out for the usual")
        if check_number("weight_decay", self.weight_decay, "1e-3 is usual") < 0:
            raise ValueError(f"expected weight_decay of 0 or more, got {self.weight_decay!r}; 1e-3 is usual")
        check_number("held_out", self.held_out, "0.2 is usual")
        if not 0 < self.held_out < 1:
            raise ValueError(f"expected held_out between 0 and 1, got {self.held_out!r}")
        if self.weighting not in get_args(Weighting):
            raise ValueError(
                f"expected weighting out of {', '.join(get_args(Weighting))}, got {self.weighting!r}"
            )


@dataclass(frozen=True)
class AdaptEpoch:
    """What an epoch gave.

    Attributes:
        epoch: Number of the epoch, counted from 1.
        source_accuracy: Accuracy on held-out source examples.
        target_accuracy: Accuracy on the target where labels exist: an oracle, not to select by.
        target_balanced_accuracy: The mean over the classes; an oracle too.
        domain_accuracy: How often the domain classifier is right on held-out source and target, 0 to 1; None
            without one.
        strength: λ at its end.
        scores: Scores to select by without target labels, higher is better.
    """

    epoch: int
    source_accuracy: float
    target_accuracy: float | None
    target_balanced_accuracy: float | None
    domain_accuracy: float | None
    strength: float
    scores: dict[str, float]


@dataclass(frozen=True)
class AdaptResult:
    """An adapted classifier and how it got there.

    Attributes:
        method: What makes the domains alike.
        history: The epochs.
        model: The model of the last epoch.
        target_logits: Class logits of the target's examples, ``[m, classes]`` of the last epoch.
    """

    method: Method
    history: tuple[AdaptEpoch, ...]
    model: DomainAdaptationModel
    target_logits: Tensor

    def selected(self, score: str) -> AdaptEpoch:
        """The epoch that a score prefers; the later of equals."""
        return max(reversed(self.history), key=lambda epoch: epoch.scores[score])


def adapt_features(
    source: Any,
    source_labels: Any,
    target: Any,
    method: str,
    settings: AdaptSettings | None = None,
    *,
    target_labels: Any = None,
) -> AdaptResult:
    """Train a classifier for the target on labelled features of the source and bare ones of the target.

    Args:
        source: Features ``[n, F]``.
        source_labels: Classes of the source's examples, int64 ``[n]``.
        target: Features ``[m, F]`` of the same layer.
        method: A name in :data:`METHODS`.
        settings: Hyper-parameters.
        target_labels: Classes of the target's examples, int64 ``[m]``, only to show oracle accuracies.

    Raises:
        ValueError: An unknown method, features that don't fit or aren't finite, one class, or target labels
            that the source has not.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> labels = torch.arange(40) % 2
        >>> source = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + 9 * labels[:, None]
        >>> result = adapt_features(source, labels, source + 1, "mmd", AdaptSettings(epochs=2))
        >>> result.target_logits.shape, len(result.history)
        (torch.Size([40, 2]), 2)
    """
    chosen, settings = find_method(method), settings or AdaptSettings()
    first, second = both(source, target)
    labels = source_labels_of(source_labels, len(first))
    classes, codes = np.unique(labels, return_inverse=True)
    truth = None
    if target_labels is not None:
        known = known_labels(target_labels, len(second), labels)
        truth = torch.from_numpy(np.searchsorted(classes, known))
    shares = [1 - settings.held_out, settings.held_out]
    train, test = stratified_split(codes.tolist(), shares, seed=settings.seed)
    normal, held_out, shifted = standardise(first[train], first[test], second)
    if chosen.normalise:
        shifted = (shifted - shifted.mean(axis=0)) / np.maximum(shifted.std(axis=0), 1e-6)
    run = _Run(
        chosen,
        settings,
        [_tensor(part) for part in (normal, held_out, shifted)],
        [torch.from_numpy(codes[part]) for part in (train, test)],
        truth,
        source_weights(settings.weighting, normal, codes[train], shifted, seed=settings.seed),
    )
    return run.fit(len(classes))


class _Run:
    """One training."""

    def __init__(
        self,
        method: Method,
        settings: AdaptSettings,
        inputs: list[Tensor],
        labels: list[Tensor],
        truth: Tensor | None,
        weights: ImportanceWeights | None,
    ) -> None:
        self._method, self._settings = method, settings
        self._train, self._held_out, self._target = inputs
        self._labels, self._held_out_labels = labels
        ones = torch.ones(len(self._train))
        self._truth = truth
        self._weights = ones if weights is None else torch.from_numpy(weights.weights).float()

    def fit(self, num_classes: int) -> AdaptResult:
        settings = self._settings
        with seeded(derived_seed(settings.seed, "adapt")):
            steps = -(-max(len(self._train), len(self._target)) // settings.batch_size)
            schedule = ReversalSchedule(steps * settings.epochs, settings.gamma, settings.strength)
            model = self._model(num_classes, schedule)
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
            )
            history = []
            for epoch in range(1, settings.epochs + 1):
                model.train()
                for rows, others in self._batches(steps):
                    strength = schedule().item()
                    domains = model.domains(self._train[rows], self._target[others])
                    losses = F.cross_entropy(domains.source_logits, self._labels[rows], reduction="none")
                    term, _ = model.align(domains)
                    optimizer.zero_grad()
                    factor = 1.0 if self._method.adversarial else strength
                    ((losses * self._weights[rows]).mean() + factor * term).backward()
                    optimizer.step()
                    schedule.advance()
                history.append(self._record(model, epoch, schedule().item()))
        return AdaptResult(self._method, tuple(history), model, _logits(model, self._target))

    def _model(self, num_classes: int, schedule: ReversalSchedule) -> DomainAdaptationModel:
        width = self._settings.hidden
        body = nn.Sequential(nn.Linear(self._train.shape[1], width), nn.ReLU())
        term = self._method.make(width, num_classes, schedule)
        return DomainAdaptationModel(
            body,
            nn.Linear(width, num_classes),
            domain_head(width),
            schedule if term is None else 1.0,
            alignment=term,
        )

    def _batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = self._settings.batch_size
        orders = [_endless(len(part), steps * size) for part in (self._train, self._target)]
        return zip(orders[0].split(size), orders[1].split(size), strict=True)

    def _record(self, model: DomainAdaptationModel, epoch: int, strength: float) -> AdaptEpoch:
        model.eval()
        with torch.no_grad():
            domains = model.domains(self._held_out, self._target)
            domain_logits = model.domain_logits(domains)
        readings = Readings(
            domains.source_features,
            domains.source_logits,
            self._held_out_labels,
            domains.target_features,
            domains.target_logits,
            self._truth,
        )
        right = domains.source_logits.argmax(dim=1) == self._held_out_labels
        return AdaptEpoch(
            epoch,
            float(right.double().mean()),
            *oracle(readings),
            None if domain_logits is None else float(domain_accuracy(domain_logits, domains.is_target())),
            strength,
            target_scores(readings),
        )


def _tensor(features: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(features).float()


@torch.no_grad()
def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    logits: Tensor = model(inputs)
    return logits


def _endless(count: int, wanted: int) -> Tensor:
    """Indices in random order, as many passes as it takes."""
    return torch.cat([torch.randperm(count) for _ in range(-(-wanted // count))])[:wanted]
