"""Adaptation methods by name, ready to be trained on features."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from fastlora._core.words import look_up
from fastlora.domain.methods import (
    CDAN,
    Alignment,
    DeepCORAL,
    JointMMD,
    MinimumClassConfusion,
    MultiKernelMMD,
    SourceOnly,
)
from fastlora.domain.methods.adversarial import conditional_features
from fastlora.nn.gradient_reversal import ReversalSchedule

Make = Callable[[int, int, ReversalSchedule], Alignment | None]


@dataclass(frozen=True)
class Method:
    """A way to adapt.

    Attributes:
        name: Name as users give it.
        title: Name for readers.
        make: Maker of the method's term from feature size, number of classes and schedule; None stands for
            DANN with the model's own domain classifier.
        adversarial: Whether the schedule is inside the term; other terms are multiplied by it.
        normalise: Whether each domain's features are standardised by its own statistics.
    """

    name: str
    title: str
    make: Make
    adversarial: bool = False
    normalise: bool = False


def domain_head(inputs: int, hidden: int = 256) -> nn.Module:
    """A domain classifier with one hidden layer: ``[B, inputs]`` to ``[B, 1]``."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def _cdan(entropy: bool) -> Make:
    def make(features: int, classes: int, schedule: ReversalSchedule) -> Alignment:
        head = domain_head(conditional_features(features, classes))
        return CDAN(head, features, classes, schedule, entropy=entropy)

    return make


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("source_only", "source only", lambda *sizes: SourceOnly()),
        Method("domain_norm", "per-domain normalisation", lambda *sizes: SourceOnly(), normalise=True),
        Method("mmd", "MK-MMD (DAN)", lambda *sizes: MultiKernelMMD()),
        Method("jan", "JAN", lambda *sizes: JointMMD()),
        Method("mmd_norm", "MK-MMD + normalisation", lambda *sizes: MultiKernelMMD(), normalise=True),
        Method("jan_norm", "JAN + normalisation", lambda *sizes: JointMMD(), normalise=True),
        Method("coral", "Deep CORAL", lambda *sizes: DeepCORAL()),
        Method("mcc", "MCC", lambda *sizes: MinimumClassConfusion()),
        Method("dann", "DANN", lambda *sizes: None, adversarial=True),
        Method("dann_norm", "DANN + normalisation", lambda *sizes: None, adversarial=True, normalise=True),
        Method("cdan", "CDAN", _cdan(entropy=False), adversarial=True),
        Method("cdan_e", "CDAN+E", _cdan(entropy=True), adversarial=True),
    )
}


def find_method(name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: There is none; near names are listed first.

    Example:
        >>> find_method("mmd").title
        'MK-MMD (DAN)'
    """
    return look_up(name, METHODS, "a method")
