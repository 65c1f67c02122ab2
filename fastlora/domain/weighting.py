"""Weights that make the source look like the target: by density ratio, or by class priors."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlora.domain._features import Array, as_labels, both, logistic, standardise
from fastlora.domain.divergence import balanced_weights
from fastlora.domain.names import Weighting as Weighting
from fastlora.domain.shift import estimate_label_shift

LIMIT = 10.0


@dataclass(frozen=True)
class ImportanceWeights:
    """Weights of the source's examples.

    Attributes:
        weights: How much each counts, float64 ``[n]`` of mean 1.
        effective_sample_size: (Σw)² / Σw²: as many equally weighted examples would be as good.
        clipped: How many were cut down to the limit.
    """

    weights: Array
    effective_sample_size: float
    clipped: int


def importance_weights(
    source: Any, target: Any, *, limit: float = LIMIT, strength: float = 1.0
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

    Example:
        >>> import torch
        >>> source = torch.arange(40.0)[:, None]
        >>> weights = importance_weights(source, source + 10).weights
        >>> bool(weights[0] < weights[-1])
        True
    """
    if not limit > 1:
        raise ValueError(f"expected limit above 1, got {limit}; 10 is usual")
    return clipped(density_ratio(source, target, strength=strength), limit)


def density_ratio(source: Any, target: Any, *, strength: float = 1.0) -> Array:
    """p_T(x) / p_S(x) of the source's examples, float64 ``[n]``, as the classifier has it: of mean about 1.

    Args:
        source: Features ``[n, F]``.
        target: Features ``[m, F]``.
        strength: Inverse of the classifier's ridge.

    Raises:
        ValueError: See :func:`fastlora.domain.divergence.proxy_a_distance`.
        ImportError: scikit-learn is not installed.
    """
    first, second = both(source, target)
    domains = np.repeat([0, 1], [len(first), len(second)])
    inputs, sources = standardise(np.concatenate([first, second]), first)
    model = logistic(inputs, domains, weights=balanced_weights(domains), strength=strength)
    # both domains count alike, so the odds are the density ratio
    ratio: Array = np.exp(model.decision_function(sources))
    return ratio


def source_weights(
    weighting: Weighting, source: Any, source_labels: Any, target: Any, *, seed: int = 0
) -> ImportanceWeights | None:
    """Weights of the source's examples as a remedy for a shift, None for ``"none"``.

    Args:
        weighting: ``"importance"`` for covariate shift, see :func:`importance_weights`; ``"label_shift"`` for
            other class shares, see :func:`fastlora.domain.shift.estimate_label_shift`.
        source: Features ``[n, F]``.
        source_labels: Classes of the source's examples, int64 ``[n]``.
        target: Features ``[m, F]``.
        seed: Seed of the estimate of the class shares.

    Raises:
        ValueError: See the functions above, or no class of the source is left in the target.
    """
    if weighting == "none":
        return None
    if weighting == "importance":
        return importance_weights(source, target)
    labels = as_labels("source", source_labels, len(source))
    return clipped(estimate_label_shift(source, labels, target, seed=seed).weights(labels), LIMIT)


def clipped(weights: Array, limit: float) -> ImportanceWeights:
    """Weights of mean 1, none above ``limit`` before the last division by the mean."""
    relative = weights / weights.mean()
    cut = np.minimum(relative, limit)
    final: Array = cut / cut.mean()
    size = float(final.sum() ** 2 / np.square(final).sum())
    return ImportanceWeights(final, size, int((relative > limit).sum()))
