"""What makes features of two domains alike, behind one interface."""

from fastlora.domain.methods.adversarial import CDAN, DANN
from fastlora.domain.methods.alignment import Alignment, Domains, SourceOnly
from fastlora.domain.methods.confusion import MinimumClassConfusion
from fastlora.domain.methods.moments import DeepCORAL, JointMMD, MultiKernelMMD

__all__ = [
    "CDAN",
    "DANN",
    "Alignment",
    "DeepCORAL",
    "Domains",
    "JointMMD",
    "MinimumClassConfusion",
    "MultiKernelMMD",
    "SourceOnly",
]
