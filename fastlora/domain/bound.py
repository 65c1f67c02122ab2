"""Ben-David's bound on the target error, its terms estimated and shown side by side."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlora.domain._features import (
    Array,
    Labels,
    both,
    halves,
    known_labels,
    logistic,
    source_labels_of,
    standardise,
)
from fastlora.domain.divergence import ADistance, proxy_a_distance

CAVEATS = (
    "The proxy A-distance is a lower estimate of d_HΔH, by linear classifiers; the sum is no guarantee.",
    "A low distance alone is no virtue: features that tell nothing apart have none.",
    "A high distance alone is no harm: domains can differ where the classes do not.",
)


@dataclass(frozen=True)
class Bound:
    """ε_T ≤ ε_S + ½ d_HΔH + λ (Ben-David et al. 2010, Machine Learning 79), each term an estimate.

    Attributes:
        source_error: ε_S of a linear classifier trained on the source, held out.
        distance: Proxy for d_HΔH.
        joint_error: λ, ε_S + ε_T of a linear classifier trained on both, held out; None without target
            labels.
        target_error: ε_T of the first classifier, observed; None without target labels.
        caveats: What the numbers do not say.
    """

    source_error: float
    distance: ADistance
    joint_error: float | None
    target_error: float | None
    caveats: tuple[str, ...] = CAVEATS

    @property
    def total(self) -> float | None:
        """The sum, or None where λ is unknown."""
        if self.joint_error is None:
            return None
        return self.source_error + 0.5 * self.distance.value + self.joint_error

    def __str__(self) -> str:
        """The terms, their sum beside the observed error, and the caveats."""
        unknown = "unknown (needs target labels)"
        rows = {
            "source error": f"{self.source_error:.3f}",
            "half the proxy A-distance": f"{0.5 * self.distance.value:.3f}"
            + (" (saturated)" if self.distance.saturated else ""),
            "joint error λ": unknown if self.joint_error is None else f"{self.joint_error:.3f}",
            "sum": unknown if self.total is None else f"{self.total:.3f}",
            "observed target error": unknown if self.target_error is None else f"{self.target_error:.3f}",
        }
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
        return "\n".join([*lines, *self.caveats])


def ben_david_bound(
    source: Any, source_labels: Any, target: Any, target_labels: Any = None, *, splits: int = 5, seed: int = 0
) -> Bound:
    """Estimate the bound's terms for linear classifiers on features.

    Args:
        source: Features ``[n, F]``.
        source_labels: Classes of the source's examples, int64 ``[n]``.
        target: Features ``[m, F]``.
        target_labels: Classes of the target's examples, int64 ``[m]``, for λ and the observed error; None
            if there are none.
        splits: Random halves to average over.
        seed: Seed of the halves.

    Raises:
        ValueError: See :func:`proxy_a_distance`; one class in the source; labels that the source has not.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> labels = torch.arange(40) % 2
        >>> source = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + 9 * labels[:, None]
        >>> ben_david_bound(source, labels, source).source_error
        0.0
    """
    first, second = both(source, target, least=8)
    labels = source_labels_of(source_labels, len(first))
    known = None if target_labels is None else known_labels(target_labels, len(second), labels)
    errors = [_errors(first, labels, second, known, seed + index) for index in range(splits)]
    source_error, target_error, joint = (
        None if column[0] is None else float(np.mean(column)) for column in zip(*errors, strict=True)
    )
    assert source_error is not None
    distance = proxy_a_distance(first, second, splits=splits, seed=seed)
    return Bound(source_error, distance, joint, target_error)


def _errors(
    source: Array, labels: Labels, target: Array, known: Labels | None, seed: int
) -> tuple[float, float | None, float | None]:
    train, test = halves(len(source), seed)
    inputs, held_out, shifted = standardise(source[train], source[test], target)
    alone = logistic(inputs, labels[train])
    source_error = float((alone.predict(held_out) != labels[test]).mean())
    if known is None:
        return source_error, None, None
    target_error = float((alone.predict(shifted) != known).mean())
    second_train, second_test = halves(len(target), seed)
    pooled, first_half, second_half = standardise(
        np.concatenate([source[train], target[second_train]]), source[test], target[second_test]
    )
    joint = logistic(pooled, np.concatenate([labels[train], known[second_train]]))
    wrong_first = (joint.predict(first_half) != labels[test]).mean()
    wrong_second = (joint.predict(second_half) != known[second_test]).mean()
    return source_error, target_error, float(wrong_first + wrong_second)
