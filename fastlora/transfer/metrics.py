"""Scores of a classifier, all read off its confusion matrix."""

import torch
from torch import Tensor


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count how often each class was taken for each.

    Args:
        labels: int64 ``[n]``.
        predictions: int64 ``[n]``.
        num_classes: c; labels and predictions are below it.

    Returns:
        int64 ``[c, c]``; row = true class, column = predicted class.

    Example:
        >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    pairs = labels * num_classes + predictions
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def accuracy(confusion: Tensor) -> float:
    """Share of pictures that were labelled right.

    Example:
        >>> accuracy(torch.tensor([[3, 1], [0, 4]]))
        0.875
    """
    return confusion.trace().item() / confusion.sum().item()


def accuracy_standard_error(confusion: Tensor) -> float:
    """Binomial standard error of the accuracy: how far it may be off with so few pictures.

    Example:
        >>> round(accuracy_standard_error(torch.tensor([[45, 5], [5, 45]])), 6)
        0.03
    """
    right = accuracy(confusion)
    error: float = (right * (1 - right) / confusion.sum().item()) ** 0.5
    return error


def accuracy_interval(confusion: Tensor, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of the accuracy: within 0 and 1, and not empty where all or none are right.

    Wilson 1927, J. Am. Stat. Assoc. 22, 209; see Brown, Cai & DasGupta 2001, Statistical Science 16, 101.

    Args:
        confusion: Counts by true and predicted class, from :func:`confusion_matrix`.
        z: Quantile of the normal distribution; this one gives 95 %.

    Example:
        >>> [round(limit, 3) for limit in accuracy_interval(torch.tensor([[9, 0], [0, 9]]))]
        [0.824, 1.0]
    """
    n, p = int(confusion.sum()), accuracy(confusion)
    middle = p + z**2 / (2 * n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    # rounding may carry them a little over
    return max(low, 0.0), min(high, 1.0)


def balanced_accuracy(confusion: Tensor) -> float:
    """Mean over the classes of the share labelled right; classes without pictures don't count.

    Example:
        >>> balanced_accuracy(torch.tensor([[3, 1], [0, 8]]))
        0.875
    """
    pictures = confusion.sum(dim=1).double()
    present = pictures > 0
    return (confusion.diag()[present] / pictures[present]).mean().item()
