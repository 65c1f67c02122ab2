"""How far two domains are apart: proxy A-distance, MMD, CORAL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastlora._core.extras import require
from fastlora._core.log import logger
from fastlora.domain._features import Array, both, halves, logistic, standardise
from fastlora.domain.gaussian import BANDWIDTHS, gaussian_kernels, mmd_of, squared_distances

LEAST = 8
_SATURATED = 1.95


@dataclass(frozen=True)
class ADistance:
    """Proxy A-distance.

    Attributes:
        value: 0 (no classifier can tell the domains apart) to 2 (a linear one always does).
        interval: 2.5 and 97.5 % points of the mean over the splits, by Student's distribution.
        splits: The value of every split.
        saturated: Whether it is so near 2 that it says no more than "different".
    """

    value: float
    interval: tuple[float, float]
    splits: tuple[float, ...]
    saturated: bool


def proxy_a_distance(
    source: Any, target: Any, *, splits: int = 5, seed: int = 0, warn: bool = True
) -> ADistance:
    """2 (1 − 2ε), ε the held-out error of a linear domain classifier (Ben-David et al. 2006).

    Half of each domain trains a logistic regression on standardised features, the domains counted alike; the
    other half judges it. Clipped to [0, 2].

    Args:
        source: Features ``[n, F]``, tensor or array.
        target: Features ``[m, F]`` of the same layer.
        splits: Random halves to average over.
        seed: Seed of the splits.
        warn: Log a warning at saturation.

    Raises:
        ValueError: Fewer than 8 examples of a domain, other sizes, not finite, or all constant.
        ImportError: scikit-learn is not installed.

    Example:
        >>> source = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        >>> proxy_a_distance(source, source + 9, warn=False).value
        2.0
    """
    first, second = both(source, target, least=LEAST)
    if splits < 2:
        raise ValueError(f"expected splits of at least 2 for an interval, got {splits}")
    values = [_one_split(first, second, seed + index) for index in range(splits)]
    mean = float(np.mean(values))
    margin = _student(splits - 1) * float(np.std(values, ddof=1)) / splits**0.5
    saturated = mean > _SATURATED
    if saturated and warn:
        logger.warning(
            "proxy A-distance %.2f of %d and %d examples with %d features is saturated: a linear classifier "
            "tells the domains apart, which wide features always allow it with few examples",
            mean,
            len(first),
            len(second),
            first.shape[1],
        )
    return ADistance(mean, (max(0.0, mean - margin), min(2.0, mean + margin)), tuple(values), saturated)


def mmd_distance(source: Any, target: Any, *, bandwidths: Sequence[float] = BANDWIDTHS) -> float:
    """Squared maximum mean discrepancy (Gretton et al. 2012, JMLR 13), biased, as :class:`MultiKernelMMD`.

    Args:
        source: Features ``[n, F]``, tensor or array.
        target: Features ``[m, F]`` of the same layer.
        bandwidths: Multiples of the mean squared distance, one for each Gaussian kernel.

    Raises:
        ValueError: Fewer than 2 examples of a domain, features of other sizes, or not finite.

    Example:
        >>> source = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        >>> mmd_distance(source, source) < 1e-6 < mmd_distance(source, source + 1)
        True
    """
    first, second = both(source, target)
    distances = squared_distances(torch.from_numpy(np.concatenate([first, second])))
    return float(mmd_of(gaussian_kernels(distances, bandwidths), len(first)))


def coral_distance(source: Any, target: Any) -> float:
    """‖C_S − C_T‖² / 4F² of the covariances, as :class:`DeepCORAL`.

    Args:
        source: Features ``[n, F]``, tensor or array.
        target: Features ``[m, F]`` of the same layer.

    Raises:
        ValueError: Fewer than 2 examples of a domain, features of other sizes, or not finite.

    Example:
        >>> source = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        >>> coral_distance(source, source + 1) < 1e-6 < coral_distance(source, 2 * source)
        True
    """
    first, second = both(source, target)
    difference = np.cov(first, rowvar=False) - np.cov(second, rowvar=False)
    return float(np.square(difference).sum() / (4 * first.shape[1] ** 2))


def domain_split(
    source: Array, target: Array, seed: int
) -> tuple[tuple[Array, np.ndarray[Any, Any]], tuple[Array, np.ndarray[Any, Any]]]:
    """Standardised features and domains (0, 1) of a half to train on and a half to judge with."""
    parts = [halves(len(features), seed) for features in (source, target)]
    train, test = (
        (
            np.concatenate([source[parts[0][half]], target[parts[1][half]]]),
            np.repeat([0, 1], [len(parts[0][half]), len(parts[1][half])]),
        )
        for half in (0, 1)
    )
    fitted, judged = standardise(train[0], test[0])
    return (fitted, train[1]), (judged, test[1])


def balanced_weights(domains: np.ndarray[Any, Any]) -> Array:
    """Weights with which both domains count alike; their mean is 1."""
    counts = np.bincount(domains, minlength=2)
    weights: Array = len(domains) / (2.0 * counts[domains])
    return weights


def _one_split(source: Array, target: Array, seed: int) -> float:
    (inputs, domains), (judged, truth) = domain_split(source, target, seed)
    model = logistic(inputs, domains, weights=balanced_weights(domains))
    wrong = model.predict(judged) != truth
    error = 0.5 * (wrong[truth == 0].mean() + wrong[truth == 1].mean())
    return float(np.clip(2 * (1 - 2 * error), 0.0, 2.0))


def _student(freedom: int) -> float:
    # scikit-learn brings SciPy
    stats = require("scipy.stats", distribution="scipy", purpose="an interval", extra="domain")
    return float(stats.t.ppf(0.975, freedom))
