"""Batches of both domains, and a model that takes them in one forward."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.domain.methods import Domains
from fastlora.domain.model import DomainAdaptationModel
from fastlora.nn.gradient_reversal import ReversalSchedule
from fastlora.transfer.training.batches import BatchPlan, Part


@dataclass(frozen=True)
class PairedPart(Part):
    """A part of a batch of the source, and one of the target.

    Attributes:
        target: Inputs ``[b, ...]``.
    """

    target: Tensor


class PairedModel(nn.Module):
    """A :class:`DomainAdaptationModel` whose one forward gives all that a step needs.

    Launchers of several processes wrap a module's forward, so everything has to be inside it.

    Args:
        model: The adapting model, with the method's term.
        schedule: λ; part of the term of adversarial methods.
        adversarial: Whether it is.
    """

    def __init__(
        self, model: DomainAdaptationModel, schedule: ReversalSchedule, *, adversarial: bool
    ) -> None:
        """See the class."""
        super().__init__()
        self.model, self.schedule, self._adversarial = model, schedule, adversarial

    def forward(self, inputs: Any) -> Any:
        """Class logits of a tensor; of a pair of source and target the source's logits and the term."""
        if isinstance(inputs, Tensor):
            return self.model(inputs)
        domains = self.model.domains(*inputs)
        with torch.autocast(domains.source_features.device.type, enabled=False):
            term, _ = self.model.align(domains.float())
            return domains.source_logits, term if self._adversarial else self.schedule() * term

    @torch.no_grad()
    def domain_logits(self, domains: Domains) -> Tensor | None:
        """What the method's domain classifier says of features that are there; None without one."""
        return self.model.domain_logits(domains)


class FeaturesAndLogits(nn.Module):
    """Both side by side, ``[B, F + classes]``: for one pass over pictures that are judged.

    Args:
        model: The model whose features and logits these are.
    """

    def __init__(self, model: DomainAdaptationModel) -> None:
        """See the class."""
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Of a batch of one domain."""
        features = self.model.feature_extractor(inputs)
        return torch.cat([features.float(), self.model.classifier(features).float()], dim=1)


def paired(
    source: Iterator[list[Part]], target: BatchPlan, step: int, steps_per_pass: int, workers: int
) -> Iterator[list[PairedPart]]:
    """Batches of the source with those of the target beside them, which is gone through again and again.

    Args:
        source: Batches of the source.
        target: Cuts the target into batches.
        step: Optimiser steps done: the target's place follows from it alone.
        steps_per_pass: Batches of the target.
        workers: Processes that load pictures.
    """
    for parts, others in zip(source, _endless(target, step, steps_per_pass, workers), strict=False):
        yield [
            PairedPart(own.inputs, own.labels, own.counted, own.names + other.names, other.inputs)
            for own, other in zip(parts, others, strict=True)
        ]


def _endless(plan: BatchPlan, step: int, steps_per_pass: int, workers: int) -> Iterator[list[Part]]:
    first, place = divmod(step, steps_per_pass)
    for number in count(first):
        yield from plan.load(number, place if number == first else 0, workers)
