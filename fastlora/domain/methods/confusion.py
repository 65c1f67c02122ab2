"""Minimum class confusion: a loss on the target alone."""

import torch
from torch import Tensor

from fastlora._core.option_checks import check_positive
from fastlora.domain.methods.alignment import Alignment, Domains


class MinimumClassConfusion(Alignment):
    """How much the target's predictions mix up classes (MCC, Jin et al. 2020, arXiv 1912.03699).

    Args:
        temperature: Softens the probabilities.
    """

    def __init__(self, temperature: float = 2.5) -> None:
        """See the class."""
        super().__init__()
        self.temperature = check_positive("temperature", temperature, "2.5 is the paper's")

    def forward(self, domains: Domains) -> Tensor:
        """Mean over the classes of their share that is confused with others, 0 to 1."""
        probabilities = (domains.target_logits / self.temperature).softmax(dim=1)
        uncertainty = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(dim=1).detach()
        weights = 1.0 + torch.exp(-uncertainty)
        weights = weights * (len(weights) / weights.sum())
        confusion = (probabilities * weights[:, None]).T @ probabilities
        confusion = confusion / confusion.sum(dim=1, keepdim=True)
        return (confusion.sum() - confusion.trace()) / len(confusion)
