"""Which kind of shift lies between two domains, and what can be done about it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlora._core.extras import require
from fastlora.domain._features import (
    Array,
    Labels,
    as_labels,
    both,
    halves,
    logistic,
    source_labels_of,
    standardise,
)
from fastlora.domain.divergence import balanced_weights, domain_split

_LEAST = 20
_CONFIDENCE = 0.05
_BOOTSTRAPS = 200
_CLOSE_TO_SINGULAR = 20.0
# how heavily it weighs that shares sum to 1
_SUM_COUNTS = 100.0


@dataclass(frozen=True)
class LabelShift:
    """Priors of the classes in the target, estimated without its labels.

    Attributes:
        classes: Labels, in order.
        source: Share of each class in the source.
        target: Estimated share in the target.
        interval: ``[classes, 2]``: 2.5 and 97.5 % points of the estimate, by bootstrap.
        condition: Condition number of the confusion matrix; large where classes are mixed up too often to say
            anything.
        shifted: Whether the source's share lies outside the interval of any class, all together at 95 %.
    """

    classes: tuple[int, ...]
    source: Array
    target: Array
    interval: Array
    condition: float
    shifted: bool

    def weights(self, labels: Any) -> Array:
        """Weight of each example of the source, of mean about 1: target share over source share."""
        places = {label: index for index, label in enumerate(self.classes)}
        ratio = self.target / self.source
        return np.array([ratio[places[int(label)]] for label in labels])


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose_shift` found.

    Attributes:
        kind: ``"none"``, ``"covariate shift"``, ``"label shift"`` or ``"both"``.
        domain_accuracy: Balanced, of a held-out linear domain classifier; 0.5 is chance.
        domain_p_value: Probability of that accuracy or a better one by chance.
        residual_accuracy: Balanced accuracy of a domain classifier once the source has the target's estimated
            class shares.
        residual_p_value: Probability of ``residual_accuracy`` or a better one by chance.
        labels: The estimated class shares.
        remedy: What to try, in words.
    """

    kind: str
    domain_accuracy: float
    domain_p_value: float
    residual_accuracy: float
    residual_p_value: float
    labels: LabelShift
    remedy: str


_REMEDIES = {
    "none": "Nothing to adapt to: train on the source as it is.",
    "covariate shift": "Adapt the features (fastlora adapt --method: per-domain normalisation, MMD, DANN), "
    "or weigh the source (--weighting importance) if its effective sample size stays large.",
    "label shift": "Weigh the source's classes by the shares below (fastlora adapt --method source_only "
    "--weighting label_shift); alignment of the features would hurt.",
    "both": "Weigh the source's classes and adapt the features, together (fastlora adapt --weighting "
    "label_shift --method mmd); where P(x | y) differs as well, the estimated shares are wrong.",
}


def estimate_label_shift(source: Any, source_labels: Any, target: Any, *, seed: int = 0) -> LabelShift:
    """Class priors of the target by black-box shift estimation (BBSE, Lipton et al. 2018, arXiv 1802.03916).

    A linear classifier is trained on half of the source; its confusion on the other half is inverted to
    explain what it predicts on the target, by shares that are not negative and sum to 1. Right where
    P(x | y) is the same in both domains.

    Args:
        source: Features ``[n, F]``.
        source_labels: Classes of the source's examples, int64 ``[n]``.
        target: Features ``[m, F]``.
        seed: Seed of the halves and the bootstrap.

    Raises:
        ValueError: Too few examples, one class, or a class with fewer than 4 examples.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> labels = torch.arange(80) % 2
        >>> source = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)) + 9 * labels[:, None]
        >>> estimate_label_shift(source, labels, source[labels == 1].repeat(2, 1)).target.round(1).tolist()
        [0.0, 1.0]
    """
    first, second = both(source, target, least=_LEAST)
    labels = source_labels_of(source_labels, len(first))
    classes, codes = np.unique(labels, return_inverse=True)
    counts = np.bincount(codes)
    if counts.min() < 4:
        raise ValueError(
            f"expected at least 4 examples of each class in the source, got {counts.min()} of class "
            f"{classes[counts.argmin()]}; a half has to train, a half to judge"
        )
    train, test = _stratified_halves(codes, seed)
    inputs, held_out, shifted = standardise(first[train], first[test], second)
    model = logistic(inputs, codes[train], weights=(len(train) / (len(classes) * counts[codes[train]] / 2)))
    predicted, on_target = model.predict(held_out), model.predict(shifted)
    share = counts / counts.sum()
    estimate, condition = _invert(codes[test], predicted, on_target, share)
    draws = _bootstrap(codes[test], predicted, on_target, share, seed)
    # Bonferroni: any of the classes may fall out by chance
    wide = _interval(draws, _CONFIDENCE / len(share))
    moved = bool(((share < wide[:, 0]) | (share > wide[:, 1])).any())
    names = tuple(int(label) for label in classes)
    return LabelShift(names, share, estimate, _interval(draws, _CONFIDENCE), condition, moved)


def diagnose_shift(source: Any, source_labels: Any, target: Any, *, seed: int = 0) -> Diagnosis:
    """Tell covariate shift from label shift, on features.

    A domain classifier says whether the domains differ at all. If BBSE finds other class shares, the source
    is drawn again with them, and a second domain classifier says whether anything else differs.

    Args:
        source: Features ``[n, F]``.
        source_labels: Classes of the source's examples, int64 ``[n]``.
        target: Features ``[m, F]``, without labels.
        seed: Seed of every split.

    Raises:
        ValueError: See :func:`estimate_label_shift`.
        ImportError: scikit-learn is not installed.

    Returns:
        The kind of shift, the numbers it rests on, and what to try.

    Example:
        >>> import torch
        >>> labels = torch.arange(80) % 2
        >>> source = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)) + 9 * labels[:, None]
        >>> diagnose_shift(source, labels, source + torch.tensor([9, -9, 9, -9])).kind
        'covariate shift'
    """
    first, second = both(source, target, least=_LEAST)
    labels = as_labels("source", source_labels, len(first))
    shares = estimate_label_shift(first, labels, second, seed=seed)
    accuracy, p_value = _domain_test(first, second, seed)
    residual, residual_p = accuracy, p_value
    if shares.shifted:
        chosen = _with_shares(labels, shares, seed)
        residual, residual_p = _domain_test(first[chosen], second, seed)
    differs, remains = p_value < _CONFIDENCE, residual_p < _CONFIDENCE
    relabelled = shares.shifted and shares.condition < _CLOSE_TO_SINGULAR
    if not differs and not relabelled:
        kind = "none"
    elif relabelled and remains:
        kind = "both"
    else:
        kind = "label shift" if relabelled else "covariate shift"
    return Diagnosis(kind, accuracy, p_value, residual, residual_p, shares, _REMEDIES[kind])


def _stratified_halves(codes: Labels, seed: int) -> tuple[Labels, Labels]:
    parts: tuple[list[Labels], list[Labels]] = ([], [])
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        for part, chosen in zip(parts, halves(len(members), seed), strict=True):
            part.append(members[chosen])
    return np.concatenate(parts[0]), np.concatenate(parts[1])


def _invert(truth: Labels, predicted: Labels, on_target: Labels, share: Array) -> tuple[Array, float]:
    classes = len(share)
    # columns are the truth: how its examples are answered
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (predicted, truth), 1.0)
    confusion /= np.maximum(confusion.sum(axis=0), 1.0)
    answers = np.bincount(on_target, minlength=classes) / len(on_target)
    # among shares that are none below zero and sum to 1, which a plain inverse needs not be near
    least_squares = require(
        "scipy.optimize", distribution="scipy", purpose="class shares", extra="domain"
    ).nnls
    bounded = np.vstack([confusion, np.full((1, classes), _SUM_COUNTS)])
    solved = least_squares(bounded, np.append(answers, _SUM_COUNTS))[0]
    estimate = solved / solved.sum() if solved.sum() > 0 else share
    return estimate, float(np.linalg.cond(confusion))


def _bootstrap(truth: Labels, predicted: Labels, on_target: Labels, share: Array, seed: int) -> Array:
    """``[classes, draws]``: the estimate on examples drawn with repetition."""
    generator = np.random.default_rng(seed)
    estimates: Array = np.empty((len(share), _BOOTSTRAPS))
    for index in range(_BOOTSTRAPS):
        rows = generator.integers(0, len(truth), len(truth))
        others = generator.integers(0, len(on_target), len(on_target))
        estimates[:, index], _ = _invert(truth[rows], predicted[rows], on_target[others], share)
    return estimates


def _interval(draws: Array, outside: float) -> Array:
    limits: Array = np.quantile(draws, [0.5 * outside, 1 - 0.5 * outside], axis=1).T
    return limits


def _with_shares(labels: Labels, shares: LabelShift, seed: int) -> Labels:
    """As many examples of the source as can be drawn without repetition with the target's class shares."""
    generator = np.random.default_rng(seed)
    counts = np.array([(labels == label).sum() for label in shares.classes])
    wanted = shares.target > 0
    total = (counts[wanted] / shares.target[wanted]).min()
    drawn = [
        generator.permutation(np.flatnonzero(labels == label))[: round(total * share)]
        for label, share in zip(shares.classes, shares.target, strict=True)
    ]
    return np.concatenate(drawn)


def _domain_test(source: Array, target: Array, seed: int) -> tuple[float, float]:
    """Balanced held-out accuracy of a linear domain classifier, and how likely chance is as good."""
    (inputs, domains), (judged, truth) = domain_split(source, target, seed)
    model = logistic(inputs, domains, weights=balanced_weights(domains), strength=0.1)
    right = model.predict(judged) == truth
    rates, counts = np.array([right[truth == d].mean() for d in (0, 1)]), np.bincount(truth)
    accuracy = float(rates.mean())
    # by chance each rate is 1/2 with variance 1/4n, for a classifier that leans to neither side
    deviation = 0.5 * np.sqrt((0.25 / counts).sum())
    score = (accuracy - 0.5) / deviation
    return accuracy, 0.5 * math.erfc(score / math.sqrt(2.0))
