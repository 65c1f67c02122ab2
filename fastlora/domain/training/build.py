"""From a classifier to a model that adapts, and back to a plain classifier."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.domain.model import DomainAdaptationModel
from fastlora.domain.norms import DomainNorm, Standardise, join_norms
from fastlora.domain.registry import Method, domain_head
from fastlora.domain.training.paired import PairedModel
from fastlora.domain.training.settings import DomainSettings
from fastlora.nn.gradient_reversal import ReversalSchedule
from fastlora.transfer.models.heads import BottleneckHead

_MOMENTUM = 0.05


@dataclass(frozen=True)
class Adapting:
    """A classifier that is taken apart for adaptation.

    Attributes:
        paired: What is trained.
        heads: The parts of ``paired`` that learn at the head's rate.
        head: The classifier's last layers.
    """

    paired: PairedModel
    heads: nn.ModuleList
    head: BottleneckHead

    def restore(self) -> None:
        """Put the classifier together again, for the target: norms by domain become the target's alone."""
        model = self.paired.model
        self.head.classifier = model.classifier
        join_norms(model.feature_extractor)
        assert isinstance(self.head.hidden, nn.Sequential)
        norm, linear = self.head.hidden
        self.head.hidden = _folded(norm, linear)


def take_apart(
    model: nn.Module,
    head: BottleneckHead,
    method: Method,
    domain: DomainSettings,
    features: tuple[Tensor, Tensor],
    total_steps: int,
    *,
    body_trains: bool,
) -> Adapting:
    """Build what is trained around a classifier; :meth:`Adapting.restore` undoes it.

    What the head reads is standardised by the statistics of the source's features, or by each domain's own if
    the method normalises; they follow the features where the body trains.

    Args:
        model: The classifier, changed in place.
        head: The classifier's last layers, inside ``model``.
        method: What makes the domains alike.
        domain: Settings of the method.
        features: What the head reads of source and target before training, ``[n, F]`` and ``[m, F]``.
        total_steps: Optimiser steps of the run, in which λ rises.
        body_trains: Whether anything before the head trains at any time.
    """
    norm = _norm(method, features, _MOMENTUM if body_trains else 0.0).to(_device(head))
    head.hidden = nn.Sequential(norm, head.hidden)
    classifier, head.classifier = head.classifier, nn.Identity()
    assert isinstance(classifier, nn.Linear)
    width, num_classes = classifier.in_features, classifier.out_features
    schedule = ReversalSchedule(total_steps, domain.gamma, domain.strength)
    term = method.make(width, num_classes, schedule)
    separate = domain.separate_batch_norm
    adapting = DomainAdaptationModel(
        model,
        classifier,
        domain_head(width) if term is None else nn.Identity(),
        schedule if term is None else 1.0,
        alignment=term,
        separate_batch_norm=separate,
    )
    # norms of their own need a pass of their own
    adapting.separate_batch_norm = separate or method.normalise
    paired = PairedModel(adapting, schedule, adversarial=method.adversarial)
    own = [head, classifier, adapting.domain_classifier, *([] if term is None else [term])]
    return Adapting(paired, nn.ModuleList(own), head)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _norm(method: Method, features: tuple[Tensor, Tensor], momentum: float) -> nn.Module:
    source, target = (
        Standardise(part.mean(dim=0), part.std(dim=0, correction=0), momentum) for part in features
    )
    if method.normalise:
        return DomainNorm(source, target)
    # a method without normalisation must not learn the target's scale in passing
    source.momentum = 0.0
    return source


@torch.no_grad()
def _folded(norm: nn.Module, linear: nn.Module) -> nn.Linear:
    """One layer that does what both do."""
    assert isinstance(norm, Standardise)
    assert isinstance(linear, nn.Linear)
    folded = nn.Linear(linear.in_features, linear.out_features, device=_device(linear))
    folded.weight.copy_(linear.weight / norm.deviation)
    folded.bias.copy_(linear.bias - folded.weight @ norm.mean)
    return folded
