"""Split pictures so that each part has every class in proportion, and weigh classes."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def stratified_split(
    labels: Sequence[int],
    fractions: Sequence[float],
    *,
    seed: int,
    groups: Sequence[Hashable] | None = None,
    classes: Sequence[str] | None = None,
) -> list[list[int]]:
    """Indices of parts in which every class has its share.

    Of a class each part but the first gets its fraction, rounded, at least one; the first gets the rest.

    Args:
        labels: Label of every example.
        fractions: Shares of the parts; they sum to 1, the first is for training.
        seed: Seed of who goes where; the same seed and labels give the same parts.
        groups: Group of every example: those of one come into one part, and count as its first one. None
            keeps nothing together.
        classes: Names of the classes, to tell of them in errors.

    Raises:
        ValueError: Fractions that don't fit, or a class with fewer examples (groups) than parts.

    Example:
        >>> parts = stratified_split([0] * 8 + [1] * 4, [0.5, 0.25, 0.25], seed=0)
        >>> [len(part) for part in parts]
        [6, 3, 3]
        >>> stratified_split([0, 0, 0, 1, 1], [0.5, 0.5], seed=0, groups="aabcd")
        [[0, 1, 4], [2, 3]]
    """
    if len(fractions) < 2 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"expected two or more positive fractions that sum to 1, got {list(fractions)}")
    generator = torch.Generator().manual_seed(seed)
    groups = range(len(labels)) if groups is None else groups
    members = dict[Hashable, list[int]]()
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    first = torch.tensor([together[0] for together in members.values()], dtype=torch.int64)
    first_labels = torch.as_tensor(list(labels))[first]
    parts: list[list[int]] = [[] for _ in fractions]
    for label in sorted(set(labels)):
        own = first[first_labels == label]
        if len(own) < len(fractions):
            raise ValueError(
                f"expected at least {len(fractions)} examples of each class for {len(fractions)} parts, "
                f"copies not counted, got {len(own)} of class "
                f"{label if classes is None else repr(classes[label])}; add some or leave the class out"
            )
        own = own[torch.randperm(len(own), generator=generator)]
        for part, chosen in zip(parts, own.split(_sizes(len(own), fractions)), strict=True):
            part += [index for place in chosen.tolist() for index in members[groups[place]]]
    return [sorted(part) for part in parts]


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Weights ``[num_classes]`` (float32) with which a loss counts every class alike.

    examples / (classes x examples of the class), scikit-learn's ``"balanced"``; the mean over the examples
    is 1.

    Raises:
        ValueError: A class has no example.

    Example:
        >>> class_weights([0, 0, 0, 1], 2)
        tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(torch.as_tensor(list(labels)), minlength=num_classes)
    if len(counts) > num_classes or not counts.all():
        raise ValueError(
            f"expected examples of each of {num_classes} classes and no others, got {counts.tolist()} of them"
        )
    return len(labels) / (num_classes * counts.to(torch.float32))


def _sizes(count: int, fractions: Sequence[float]) -> list[int]:
    others = [max(1, round(count * fraction)) for fraction in fractions[1:]]
    # rounding up a small class may leave nothing to train on
    while sum(others) >= count:
        others[others.index(max(others))] -= 1
    return [count - sum(others), *others]
