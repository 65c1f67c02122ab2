"""How good an adapted model looks: by scores that need no target labels, and by those that do."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.domain.selection import (
    deep_embedded_validation,
    importance_weighted_score,
    information_maximisation,
    negative_entropy,
    soft_neighbourhood_density,
)
from fastlora.domain.weighting import LIMIT, clipped, density_ratio
from fastlora.transfer.metrics import accuracy, balanced_accuracy, confusion_matrix


@dataclass(frozen=True)
class Readings:
    """What a model makes of held-out source examples and of the target.

    Attributes:
        source_features: Features of the source's examples, ``[n, F]``.
        source_logits: Class logits of the source's examples, ``[n, classes]``.
        source_labels: Classes of the source's examples, int64 ``[n]``.
        target_features: Features of the target's examples, ``[m, F]``.
        target_logits: Class logits of the target's examples, ``[m, classes]``.
        target_labels: Classes of the target's examples, int64 ``[m]``; None where they are not known.
    """

    source_features: Tensor
    source_logits: Tensor
    source_labels: Tensor
    target_features: Tensor
    target_logits: Tensor
    target_labels: Tensor | None


def target_scores(readings: Readings) -> dict[str, float]:
    """All scores of :mod:`fastlora.domain.selection`; higher is better for each.

    The density ratio is estimated on the model's own features, as DEV has it.

    Raises:
        ValueError: Features that are not finite or all constant.
        ImportError: scikit-learn is not installed.
    """
    losses = F.cross_entropy(readings.source_logits, readings.source_labels, reduction="none")
    ratio = density_ratio(readings.source_features, readings.target_features)
    weights = torch.from_numpy(clipped(ratio, LIMIT).weights)
    return {
        "information_maximisation": information_maximisation(readings.target_logits),
        "negative_entropy": negative_entropy(readings.target_logits),
        "soft_neighbourhood_density": soft_neighbourhood_density(readings.target_logits),
        "importance_weighted": importance_weighted_score(losses, weights),
        # its control variate is what normalises
        "dev": deep_embedded_validation(losses, torch.from_numpy(ratio).clamp(max=LIMIT)),
    }


def oracle(readings: Readings) -> tuple[float | None, float | None]:
    """Accuracy and balanced accuracy on the target; None without labels. Not to select by."""
    if readings.target_labels is None:
        return None, None
    classes = readings.target_logits.shape[1]
    confusion = confusion_matrix(readings.target_labels, readings.target_logits.argmax(dim=1), classes)
    return accuracy(confusion), balanced_accuracy(confusion)
