"""The small classifier of ``training_runs``, adapted to inverted pictures."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sklearn.linear_model  # noqa: F401 - here, not in each of the processes that a test forks
import torch
from torch import Tensor, nn

from fastlora.domain.registry import find_method
from fastlora.domain.training.build import Adapting, take_apart
from fastlora.domain.training.settings import DomainSettings
from fastlora.domain.training.trainer import DomainTrainer
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.models.heads import BottleneckHead, deepen_head
from fastlora.transfer.training import TrainSettings
from tests.training_runs import COUNT, Noise, Pixels, pictures


@dataclass(frozen=True)
class Inverted:
    def __call__(self, index: int) -> Tensor:
        return 1.2 - Pixels()(index)


def target_pictures(transform: Any = None) -> LabelledImages:
    return replace(pictures(transform), read=Inverted())


def make_adapting(
    net: nn.Module, method: str, total_steps: int, *, body_trains: bool = True, **settings: Any
) -> Adapting:
    """The net taken apart, with statistics of features it doesn't have."""
    head = net.get_submodule(deepen_head(net, 5))
    assert isinstance(head, BottleneckHead)
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(9, 6, generator=generator) + shift for shift in (0.0, 0.5)]
    domain = DomainSettings(source="", target="", method=method, **settings)
    return take_apart(
        net,
        head,
        find_method(method),
        domain,
        (features[0], features[1]),
        total_steps,
        body_trains=body_trains,
    )


def make_domain_trainer(
    net: nn.Module,
    settings: TrainSettings,
    output: Path,
    *,
    method: str = "dann_norm",
    transform: Any = None,
    reporter: Any = None,
    **how: Any,
) -> DomainTrainer:
    """A trainer of both kinds of pictures."""
    adapting = make_adapting(net, method, settings.total_steps(COUNT))
    seen = transform or Noise()
    return DomainTrainer(
        adapting.paired,
        pictures(seen),
        pictures(),
        (target_pictures(seen), target_pictures()),
        settings,
        output=output,
        heads=adapting.heads,
        reporter=reporter,
        target_is_labelled=True,
        **how,
    )
