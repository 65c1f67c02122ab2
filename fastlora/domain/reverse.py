"""Reverse validation: a score by which methods can be compared where the target has no labels."""

from dataclasses import replace
from typing import Any

import numpy as np

from fastlora.domain._features import both, source_labels_of
from fastlora.domain.adaptation import AdaptSettings, adapt_features
from fastlora.transfer.data import stratified_split


def reverse_validation(
    source: Any, source_labels: Any, target: Any, method: str, settings: AdaptSettings | None = None
) -> float:
    """How well a method finds the way back: accuracy on held-out source examples, 0 to 1.

    The method labels the target; with these labels it is trained the other way round, from the target to the
    source, and judged on source examples whose labels were not used before (Zhong et al. 2010, ECML; Ganin et
    al. 2016, JMLR 17(59), section 5.1.2). Unlike the scores of :mod:`fastlora.domain.selection` no method
    optimises it. Costs a second training.

    Args:
        source: Features ``[n, F]``.
        source_labels: Classes of the source's examples, int64 ``[n]``.
        target: Features ``[m, F]``.
        method: A name in :data:`fastlora.domain.registry.METHODS`.
        settings: Hyper-parameters of both trainings.

    Returns:
        The accuracy; where the target was labelled with one class alone, that class's share.

    Raises:
        ValueError: See :func:`adapt_features`.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from fastlora.domain.adaptation import AdaptSettings
        >>> labels = torch.arange(40) % 2
        >>> source = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + 9 * labels[:, None]
        >>> 0 <= reverse_validation(source, labels, source + 1, "mmd", AdaptSettings(epochs=2)) <= 1
        True
    """
    settings = settings or AdaptSettings()
    first, second = both(source, target)
    labels = source_labels_of(source_labels, len(first))
    train, held_out = (
        np.array(part)
        for part in stratified_split(
            labels.tolist(), [1 - settings.held_out, settings.held_out], seed=settings.seed
        )
    )
    there = adapt_features(first[train], labels[train], second, method, settings)
    classes = np.unique(labels[train])
    answers = classes[there.target_logits.argmax(dim=1).numpy()]
    known = np.unique(answers)
    if len(known) < 2:
        return float((labels[held_out] == known[0]).mean())
    # a label that was given once can't be split; it goes with the commonest one
    counts = dict(zip(*np.unique(answers, return_counts=True), strict=True))
    common = max(counts, key=lambda label: counts[label])
    answers = np.array([label if counts[label] > 1 else common for label in answers])
    back = adapt_features(second, answers, first, method, replace(settings, seed=settings.seed + 1))
    found = np.unique(answers)[back.target_logits.argmax(dim=1).numpy()]
    return float((found[held_out] == labels[held_out]).mean())
