"""Features of two domains, checked before anything is computed from them."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastlora._core.extras import require

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def as_features(name: str, features: Tensor | npt.ArrayLike, *, least: int = 2) -> Array:
    """float64 ``[n, F]`` of a tensor or an array.

    Args:
        name: Name of the values, for errors.
        features: One row for each example.
        least: How many examples there have to be.

    Raises:
        ValueError: Not two-dimensional, too few, or not finite.
    """
    found = features.detach().cpu().double().numpy() if isinstance(features, Tensor) else features
    array: Array = np.asarray(found, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"expected {name} as features [n, F], got shape {array.shape}")
    if len(array) < least:
        raise ValueError(f"expected at least {least} examples in {name}, got {len(array)}")
    bad = int((~np.isfinite(array)).any(axis=1).sum())
    if bad:
        raise ValueError(
            f"expected finite features in {name}, got NaN or infinity in {bad} of {len(array)} examples; "
            "look at these examples or at the model that made the features"
        )
    return array


def as_labels(name: str, labels: Tensor | npt.ArrayLike, examples: int) -> Labels:
    """int64 ``[n]``.

    Raises:
        ValueError: Another number of them than of examples.
    """
    found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    array: Labels = np.asarray(found, dtype=np.int64)
    if array.shape != (examples,):
        raise ValueError(f"expected a label for each of {examples} examples of {name}, got {array.shape}")
    return array


def source_labels_of(labels: Tensor | npt.ArrayLike, examples: int) -> Labels:
    """int64 ``[n]`` of at least two classes.

    Raises:
        ValueError: Another number of them than of examples, or one class.
    """
    array = as_labels("source", labels, examples)
    if len(np.unique(array)) < 2:
        raise ValueError(
            f"expected at least two classes in the source, got only {array[0]}; "
            "a classifier tells classes apart"
        )
    return array


def known_labels(labels: Tensor | npt.ArrayLike, examples: int, source: Labels) -> Labels:
    """int64 ``[m]`` of the target, all of which the source has.

    Raises:
        ValueError: Another number of them than of examples, or a class that the source has not.
    """
    array = as_labels("target", labels, examples)
    unknown = np.setdiff1d(array, source).tolist()
    if unknown:
        raise ValueError(
            f"expected target labels that the source has ({np.unique(source).tolist()}), got {unknown} too"
        )
    return array


def both(source: Any, target: Any, *, least: int = 2) -> tuple[Array, Array]:
    """Features of both domains.

    Raises:
        ValueError: See :func:`as_features`, or of different sizes.
    """
    first, second = as_features("source", source, least=least), as_features("target", target, least=least)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"expected features of one size, got {first.shape[1]} of the source and {second.shape[1]} of the "
            "target; take them from the same layer of the same model"
        )
    return first, second


def standardise(fit: Array, *others: Array) -> list[Array]:
    """Zero mean and unit deviation by the first, which comes first again; constant columns are dropped.

    Raises:
        ValueError: All columns are constant.
    """
    deviation = fit.std(axis=0)
    # a constant's deviation is rounding error, not zero
    varied = deviation > 1e-12 * np.maximum(1.0, np.abs(fit).max(axis=0))
    if not varied.any():
        raise ValueError(
            f"expected features that vary, got {fit.shape[1]} constant ones; nothing can be told from them"
        )
    mean = fit.mean(axis=0)
    return [(part[:, varied] - mean[varied]) / deviation[varied] for part in (fit, *others)]


def logistic(inputs: Array, labels: Labels, *, weights: Array | None = None, strength: float = 1.0) -> Any:
    """A fitted logistic regression of scikit-learn.

    Args:
        inputs: Standardised features ``[n, F]``.
        labels: Class of each example; at least two differ.
        weights: How much each example counts, ``[n]``; None counts all alike.
        strength: Inverse of the ridge.
    """
    linear = require("sklearn.linear_model", distribution="scikit-learn", purpose="this", extra="domain")
    return linear.LogisticRegression(C=strength, max_iter=1000).fit(inputs, labels, sample_weight=weights)


def halves(count: int, seed: int) -> tuple[Labels, Labels]:
    """Two halves of ``count`` indices, drawn by a seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return order[: count // 2], order[count // 2 :]
