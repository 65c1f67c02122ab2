"""A domain classifier that the features learn to fool."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora._core.option_checks import check_count, check_flag
from fastlora.domain.methods.alignment import Alignment, Domains
from fastlora.nn.gradient_reversal import GradientReversalLayer, ReversalSchedule


class DANN(Alignment):
    """Domain-adversarial training (Ganin et al. 2016, JMLR 17(59)).

    Cross-entropy of a classifier that tells the domains apart, behind gradient reversal: one backward pass
    trains it to succeed and the features to make it fail.

    Args:
        domain_classifier: Module from features ``[B, F]`` to one logit of "target", ``[B, 1]`` or ``[B]``, or
            to two logits of source and target, ``[B, 2]``.
        alpha: Strength of the reversal, or a :class:`fastlora.ReversalSchedule`.
    """

    def __init__(self, domain_classifier: nn.Module, alpha: float | ReversalSchedule = 1.0) -> None:
        """See the class."""
        super().__init__()
        self.reversal, self.domain_classifier = GradientReversalLayer(alpha), domain_classifier

    def forward(self, domains: Domains) -> Tensor:
        """Cross-entropy of the domains, each counted alike."""
        return domain_loss(self.domain_logits(domains), domains.is_target())

    def domain_logits(self, domains: Domains) -> Tensor:
        """``[n + m]``, ``[n + m, 1]`` or ``[n + m, 2]``."""
        logits: Tensor = self.domain_classifier(self.reversal(domains.features()))
        return logits


class CDAN(Alignment):
    """Conditional adversarial adaptation (Long et al. 2018, https://arxiv.org/abs/1705.10667).

    The domain classifier sees features ⊗ class probabilities, so that what is made alike is features of the
    same predicted class. Large products are replaced by the paper's random projection.

    Args:
        domain_classifier: Module from ``[B, out_features]`` to one logit of "target", or to two of both
            domains.
        num_features: F.
        num_classes: C.
        alpha: Strength of the reversal, or a :class:`fastlora.ReversalSchedule`.
        entropy: Count confident predictions more (CDAN+E).
        max_features: F · C above this is projected to it.

    Attributes:
        out_features: What the domain classifier has to take.
    """

    def __init__(
        self,
        domain_classifier: nn.Module,
        num_features: int,
        num_classes: int,
        alpha: float | ReversalSchedule = 1.0,
        *,
        entropy: bool = False,
        max_features: int = 4096,
    ) -> None:
        """See the class."""
        check_flag("entropy", entropy)
        num_features = check_count("num_features", num_features, "give the width of the features")
        num_classes = check_count("num_classes", num_classes, "give the number of class logits")
        max_features = check_count("max_features", max_features, "4096 is the paper's")
        super().__init__()
        self.reversal, self.domain_classifier = GradientReversalLayer(alpha), domain_classifier
        self.entropy = entropy
        self.feature_projection: Tensor | None
        self.class_projection: Tensor | None
        self.out_features = conditional_features(num_features, num_classes, max_features)
        projected = num_features * num_classes > max_features
        self.register_buffer(
            "feature_projection", torch.randn(num_features, max_features) if projected else None
        )
        self.register_buffer(
            "class_projection", torch.randn(num_classes, max_features) if projected else None
        )

    def forward(self, domains: Domains) -> Tensor:
        """Cross-entropy of the domains, each counted alike."""
        weights = None
        if self.entropy:
            probabilities = domains.logits().detach().softmax(dim=1)
            uncertainty = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(dim=1)
            weights = 1.0 + torch.exp(-uncertainty)
        return domain_loss(self.domain_logits(domains), domains.is_target(), weights)

    def domain_logits(self, domains: Domains) -> Tensor:
        """``[n + m]``, ``[n + m, 1]`` or ``[n + m, 2]``."""
        # the classes condition; they are not what has to change
        joint = self._join(domains.features(), domains.logits().detach().softmax(dim=1))
        logits: Tensor = self.domain_classifier(self.reversal(joint))
        return logits

    def _join(self, features: Tensor, probabilities: Tensor) -> Tensor:
        if self.feature_projection is None or self.class_projection is None:
            return torch.einsum("bf,bc->bcf", features, probabilities).flatten(1)
        mixed = (features @ self.feature_projection) * (probabilities @ self.class_projection)
        scaled: Tensor = mixed * self.out_features**-0.5
        return scaled


def conditional_features(num_features: int, num_classes: int, max_features: int = 4096) -> int:
    """Size of what :class:`CDAN`'s domain classifier takes."""
    return min(num_features * num_classes, max_features)


def domain_accuracy(logits: Tensor, is_target: Tensor) -> Tensor:
    """How often domain logits are right, each domain counted alike; arguments as of :func:`domain_loss`."""
    two = logits.dim() == 2 and logits.shape[1] == 2
    answers = logits.argmax(dim=1) if two else (logits.flatten() > 0)
    right = (answers.to(is_target.dtype) == is_target).to(is_target.dtype)
    return 0.5 * (right[is_target == 0].mean() + right[is_target == 1].mean())


def domain_loss(logits: Tensor, is_target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the domains of their mean cross-entropy, so that a larger batch of one counts no more.

    Args:
        logits: ``[B]`` or ``[B, 1]`` of "target", or ``[B, 2]`` of source and target.
        is_target: Domain of each example ``[B]``, 0 for the source and 1 for the target.
        weights: How much each example counts within its domain, ``[B]``.
    """
    if logits.dim() == 2 and logits.shape[1] == 2:
        losses = F.cross_entropy(logits, is_target.long(), reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits.flatten(), is_target, reduction="none")
    weights = torch.ones_like(losses) if weights is None else weights
    means = [(losses * w).sum() / w.sum() for w in (weights * (1 - is_target), weights * is_target)]
    return 0.5 * (means[0] + means[1])
