"""A model whose features learn to serve a second domain that has no labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora._core.option_checks import check_flag
from fastlora.domain.methods import Alignment, Domains
from fastlora.domain.methods.adversarial import domain_accuracy, domain_loss
from fastlora.domain.norms import separate_batch_norms, use_domain
from fastlora.nn.gradient_reversal import GradientReversalLayer, ReversalSchedule, check_alpha


@dataclass(frozen=True)
class AdaptationLoss:
    """What :meth:`DomainAdaptationModel.loss` gives.

    Attributes:
        total: The sum of both terms, to call ``backward`` on.
        classification: Cross-entropy of the source's labels.
        alignment: The method's term; for DANN the cross-entropy of the domains.
        domain_accuracy: How often the domain classifier is right, each domain counted alike; None without
            one.
    """

    total: Tensor
    classification: Tensor
    alignment: Tensor
    domain_accuracy: Tensor | None


class DomainAdaptationModel(nn.Module):
    """Features, a classifier of them, and a domain classifier behind gradient reversal (DANN).

    Ganin et al. 2016, JMLR 17(59). Parameters that do not require gradients stay as they are, so LoRA or
    adapters inside the feature extractor make adversarial training of only these.

    Args:
        feature_extractor: Module from inputs ``[B, …]`` to features ``[B, F]``.
        classifier: Module from features to class logits ``[B, classes]``.
        domain_classifier: Module from features to domain logits, ``[B, 1]`` or ``[B, 2]``.
        alpha: Strength of the reversal, or a :class:`fastlora.ReversalSchedule`, which :meth:`loss`
            advances in train mode.
        alignment: Another method of :mod:`fastlora.domain.methods` instead of DANN for :meth:`loss`.
        separate_batch_norm: Give every BatchNorm statistics of its own for each domain; weights are shared.

    Raises:
        TypeError: ``alpha``, ``alignment`` or ``separate_batch_norm`` is nothing of the kind.
        ValueError: ``alpha`` is not finite.

    Example:
        >>> parts = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 1)
        >>> model = DomainAdaptationModel(*parts, alpha=0.5)
        >>> x = torch.zeros(5, 4)
        >>> model(x).shape, [logits.shape for logits in model(x, torch.zeros(5))]
        (torch.Size([5, 2]), [torch.Size([5, 2]), torch.Size([5, 1])])
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        classifier: nn.Module,
        domain_classifier: nn.Module,
        alpha: float | ReversalSchedule = 1.0,
        *,
        alignment: Alignment | None = None,
        separate_batch_norm: bool = False,
    ) -> None:
        """See the class."""
        check_flag("separate_batch_norm", separate_batch_norm)
        if alignment is not None and not isinstance(alignment, Alignment):
            raise TypeError(
                f"expected alignment to be a method of fastlora.domain.methods, got {alignment!r}; give an "
                "object such as MultiKernelMMD(), or None for DANN"
            )
        super().__init__()
        self.feature_extractor, self.classifier = feature_extractor, classifier
        self.domain_classifier, self.alignment = domain_classifier, alignment
        self.reversal = GradientReversalLayer(alpha)
        self.separate_batch_norm = separate_batch_norm
        if separate_batch_norm:
            separate_batch_norms(self.feature_extractor)

    @property
    def alpha(self) -> float | ReversalSchedule | Tensor:
        """Strength of the reversal."""
        return self.reversal.alpha

    @alpha.setter
    def alpha(self, alpha: float | ReversalSchedule | Tensor) -> None:
        self.reversal.alpha = check_alpha(alpha)

    def forward(self, x: Any, domain_labels: Tensor | None = None) -> Any:
        """Class logits; with ``domain_labels`` also domain logits behind the reversal.

        Args:
            x: Inputs ``[B, …]``, of the target domain or mixed.
            domain_labels: Domain of each input ``[B]``, 0 for the source and 1 for the target; they only ask
                for the second output.

        Raises:
            ValueError: There are not as many domain labels as inputs.
        """
        features = self.feature_extractor(x)
        logits = self.classifier(features)
        if domain_labels is None:
            return logits
        if len(domain_labels) != len(features):
            raise ValueError(
                f"expected a domain label for each of {len(features)} inputs, got {len(domain_labels)}"
            )
        return logits, self.domain_classifier(self.reversal(features))

    def loss(self, source_batch: tuple[Any, Tensor], target_batch: Any) -> AdaptationLoss:
        """What to minimise for a batch of each domain.

        Args:
            source_batch: Inputs and their labels (int64 ``[n]``).
            target_batch: Inputs; of a pair, as data loaders give them, the first.

        Raises:
            ValueError: A batch is empty.
        """
        inputs, labels = source_batch
        target = target_batch[0] if isinstance(target_batch, tuple | list) else target_batch
        if not len(labels) or not len(target):
            raise ValueError(
                f"expected examples of both domains, got {len(labels)} of the source and {len(target)} of "
                "the target"
            )
        domains = self.domains(inputs, target)
        classification = F.cross_entropy(domains.source_logits, labels)
        alignment, domain_logits = self.align(domains)
        accuracy = None
        if domain_logits is not None:
            accuracy = domain_accuracy(domain_logits.detach(), domains.is_target())
        if self.training:
            for module in self.modules():
                if isinstance(module, ReversalSchedule):
                    module.advance()
        return AdaptationLoss(classification + alignment, classification, alignment, accuracy)

    @contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Use the BatchNorm statistics of ``"source"`` or ``"target"`` inside a ``with`` block.

        Outside one it is the target's, which the model is for.
        """
        with use_domain(self.feature_extractor, name):
            yield

    def align(self, domains: Domains) -> tuple[Tensor, Tensor | None]:
        """The method's term; and domain logits ``[n + m, …]`` of DANN with the own domain classifier."""
        if self.alignment is not None:
            return self.alignment(domains), None
        logits = self.domain_classifier(self.reversal(domains.features()))
        return domain_loss(logits, domains.is_target()), logits

    def domain_logits(self, domains: Domains) -> Tensor | None:
        """What the method's domain classifier says; None if it has none."""
        return self.align(domains)[1] if self.alignment is None else self.alignment.domain_logits(domains)

    def domains(self, source: Any, target: Any) -> Domains:
        """Features and logits of a batch of each domain."""
        if self.separate_batch_norm:
            with self.domain("source"):
                first = self.feature_extractor(source)
            with self.domain("target"):
                second = self.feature_extractor(target)
        else:
            features = self.feature_extractor(torch.cat([source, target]))
            first, second = features[: len(source)], features[len(source) :]
        logits = self.classifier(torch.cat([first, second]))
        return Domains(first, second, logits[: len(first)], logits[len(first) :])
