"""The interface of all methods: from what a model makes of both domains to a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Domains:
    """What a model makes of a batch of either domain.

    Attributes:
        source_features: Features of the source's examples, ``[n, F]``.
        target_features: Features of the target's examples, ``[m, F]``.
        source_logits: Class logits of the source's examples, ``[n, classes]``.
        target_logits: Class logits of the target's examples, ``[m, classes]``.
    """

    source_features: Tensor
    target_features: Tensor
    source_logits: Tensor
    target_logits: Tensor

    def features(self) -> Tensor:
        """``[n + m, F]``, the source's first."""
        return torch.cat([self.source_features, self.target_features])

    def logits(self) -> Tensor:
        """``[n + m, classes]``, the source's first."""
        return torch.cat([self.source_logits, self.target_logits])

    def float(self) -> "Domains":
        """Everything in float32: distances and covariances lose too much in 16 bits."""
        parts = self.source_features, self.target_features, self.source_logits, self.target_logits
        return Domains(*(part.float() for part in parts))

    def is_target(self) -> Tensor:
        """float32 ``[n + m]``: 0 for the source, 1 for the target."""
        ones = [torch.zeros(len(self.source_features)), torch.ones(len(self.target_features))]
        return torch.cat(ones).to(self.source_features.device)


class Alignment(nn.Module):
    """A term beside the source's cross-entropy, to be minimised together with it."""

    def forward(self, domains: Domains) -> Tensor:
        """The term, a number."""
        raise NotImplementedError

    def domain_logits(self, domains: Domains) -> Tensor | None:
        """What a domain classifier says, as :func:`domain_accuracy` takes it; None of methods without one."""
        return None


class SourceOnly(Alignment):
    """Nothing: what every method has to beat."""

    def forward(self, domains: Domains) -> Tensor:
        """Zero."""
        return domains.source_features.new_zeros(())
