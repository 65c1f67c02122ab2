"""Scores to choose a model by where the target has no labels; higher is better for each."""

import torch
from torch import Tensor
from torch.nn import functional as F

_COMPARED = 4000


def negative_entropy(target_logits: Tensor) -> float:
    """Minus the mean entropy of the target's predictions (nats); a model that is sure of one class wins.

    Args:
        target_logits: Class logits of the target's examples, ``[m, classes]``.

    Example:
        >>> sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> negative_entropy(unsure) < negative_entropy(sure) < 0
        True
    """
    return -float(_entropy(_probabilities(target_logits)).mean())


def information_maximisation(target_logits: Tensor) -> float:
    """Entropy of the mean prediction minus the mean entropy: sure, and not always of one class.

    Args:
        target_logits: Class logits of the target's examples, ``[m, classes]``.

    Example:
        >>> one, both = torch.tensor([[9.0, 0.0]] * 2), torch.tensor([[9.0, 0.0], [0.0, 9.0]])
        >>> information_maximisation(one) < information_maximisation(both)
        True
    """
    probabilities = _probabilities(target_logits)
    return float(_entropy(probabilities.mean(dim=0)) - _entropy(probabilities).mean())


def soft_neighbourhood_density(target_logits: Tensor, temperature: float = 0.05) -> float:
    """SND (Saito et al. 2021, arXiv 2108.10860): mean entropy of who is near whom among the predictions.

    Of more than 4,000 examples every second, third, … is compared.

    Args:
        target_logits: Class logits of the target's examples, ``[m, classes]``, at least 3 examples.
        temperature: What similarities are divided by before the softmax.

    Raises:
        ValueError: Fewer than 3 examples.

    Example:
        >>> near, apart = torch.tensor([[9.0, 0.0]] * 4), torch.eye(2).repeat(2, 1) * 9
        >>> soft_neighbourhood_density(apart) < soft_neighbourhood_density(near)
        True
    """
    points = F.normalize(_probabilities(target_logits), dim=1)
    if len(points) < 3:
        raise ValueError(f"expected at least 3 examples of the target, got {len(points)}")
    points = points[:: -(-len(points) // _COMPARED)]
    similar = points @ points.T / temperature
    similar.fill_diagonal_(-torch.inf)
    return float(_entropy(similar.softmax(dim=1)).mean())


def importance_weighted_score(source_losses: Tensor, weights: Tensor) -> float:
    """Minus the importance-weighted loss of held-out source examples (IWCV, Sugiyama et al. 2007).

    Args:
        source_losses: Losses of held-out source examples, ``[n]``.
        weights: Target density over source density at each, ``[n]``.

    Example:
        >>> losses = torch.tensor([1.0, 3.0])
        >>> importance_weighted_score(losses, torch.tensor([1.5, 0.5]))
        -1.5
    """
    losses, weights = source_losses.double(), weights.double()
    return -float((losses * weights).mean())


def deep_embedded_validation(source_losses: Tensor, weights: Tensor) -> float:
    """DEV (You et al. 2019, ICML): the weighted score with a control variate, for less variance.

    Args:
        source_losses: Losses of held-out source examples, ``[n]``.
        weights: Target density over source density at each, ``[n]``, not normalised: their mean is only
            expected to be 1.

    Raises:
        ValueError: Fewer than 2 examples.

    Example:
        >>> losses = torch.tensor([1.0, 3.0])
        >>> deep_embedded_validation(losses, torch.tensor([2.0, 1.0]))
        -3.0
    """
    losses, weights = source_losses.double(), weights.double()
    if len(losses) < 2:
        raise ValueError(f"expected at least 2 held-out source examples, got {len(losses)}")
    weighted = losses * weights
    variance = weights.var()
    if variance == 0:
        return -float(weighted.mean())
    slope = -torch.cov(torch.stack([weighted, weights]))[0, 1] / variance
    return -float(weighted.mean() + slope * (weights.mean() - 1.0))


def _probabilities(logits: Tensor) -> Tensor:
    return logits.detach().double().softmax(dim=-1)


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return entropy
