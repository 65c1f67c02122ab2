"""Weights that make the source look like the target: by density ratio, or by class priors."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlora.domain._features import Array, both, logistic, standardise
from fastlora.domain.divergence import balanced_weights


@dataclass(frozen=True)
class ImportanceWeights:
    """Weights of the source's examples.

    Attributes:
        weights: float64 ``[n]``, of mean 1.
        effective_sample_size: (Σw)² / Σw²: as many equally weighted examples would be as good.
        clipped: How many were cut down to the limit.
    """

    weights: Array
    effective_sample_size: float
    clipped: int


def importance_weights(
    source: Any, target: Any, *, limit: float = 10.0, strength: float = 1.0
) -> ImportanceWeights:
    """p_T(x) / p_S(x) by a logistic domain classifier (Bickel et al. 2007), for covariate shift.

    Args:
        source: Features ``[n, F]``.
        target: Features ``[m, F]``.
        limit: Weights above this multiple of their mean are cut down to it.
        strength: Inverse of the classifier's ridge.

    Raises:
        ValueError: ``limit`` is not above 1, or see :func:`fastlora.domain.divergence.proxy_a_distance`.
        ImportError: scikit-learn is not installed.
    """
    if not limit > 1:
        raise ValueError(f"expected limit above 1, got {limit}; 10 is usual")
    first, second = both(source, target)
    domains = np.repeat([0, 1], [len(first), len(second)])
    inputs, sources = standardise(np.concatenate([first, second]), first)
    model = logistic(inputs, domains, weights=balanced_weights(domains), strength=strength)
    # both domains count alike, so the odds are the density ratio
    return clipped(np.exp(model.decision_function(sources)), limit)


def clipped(weights: Array, limit: float) -> ImportanceWeights:
    """Weights of mean 1, none above ``limit`` before the last division by the mean."""
    relative = weights / weights.mean()
    cut = np.minimum(relative, limit)
    final: Array = cut / cut.mean()
    size = float(final.sum() ** 2 / np.square(final).sum())
    return ImportanceWeights(final, size, int((relative > limit).sum()))
