"""The one list of strategies."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastlora._core.words import did_you_mean
from fastlora.transfer.strategies import added, freezing
from fastlora.transfer.unfreezing import GradualUnfreezing


@dataclass(frozen=True)
class Strategy:
    """A way to adapt a pretrained model.

    Attributes:
        name: As users give it.
        summary: What trains, in a few words.
        apply: Chooses what trains in a model, in place; takes the model, the name of its head,
            ``train_batch_norm`` and the strategy's own options.
        lr: A learning rate to begin with, with AdamW.
        head_factor: By how much the head then learns faster.
        adds: Whether it adds parameters to a frozen model, which a small file can hold.
        unfreezing: From the number of stages and epochs to when stages begin to train.
    """

    name: str
    summary: str
    apply: Callable[..., None]
    lr: float
    head_factor: float
    adds: bool = False
    unfreezing: Callable[[int, int], GradualUnfreezing] | None = None

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the strategy doesn't have.

        Raises:
            TypeError: One is unknown; those it has are listed.
        """
        own = list(inspect.signature(self.apply).parameters)[3:]
        unknown = [name for name in options if name not in own]
        if unknown:
            has = f"its options are {', '.join(own)}" if own else "it has no options"
            raise TypeError(f"expected no option {unknown[0]!r} for strategy {self.name!r}; {has}")


# the rates of those that the demo has are its own; a pretrained weight only needs a nudge
STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("feature_extraction", "the head on frozen features", freezing.feature_extraction, 3e-3, 1.0),
        Strategy("fine_tuning", "the last stage and the head", freezing.fine_tuning, 1e-4, 30.0),
        Strategy("full", "everything", freezing.full, 3e-5, 100.0),
        Strategy(
            "gradual",
            "the head, then stage after stage",
            freezing.gradual,
            3e-5,
            100.0,
            unfreezing=freezing.gradually,
        ),
        Strategy(
            "lp_ft",
            "the head, then everything",
            freezing.lp_ft,
            3e-5,
            100.0,
            unfreezing=freezing.after_the_probe,
        ),
        Strategy("lora", "low-rank updates of every layer and the head", added.lora, 5e-4, 10.0, adds=True),
        Strategy(
            "adapter",
            "bottleneck adapters in every block and the head",
            added.adapter,
            1e-3,
            5.0,
            adds=True,
        ),
        Strategy(
            "prompt", "learned tokens before every block and the head", added.prompt, 1e-2, 0.5, adds=True
        ),
    )
}


def find_strategy(name: str) -> Strategy:
    """A strategy by its name.

    Raises:
        ValueError: There is none; near names are listed first.

    Example:
        >>> find_strategy("fine_tuning").summary
        'the last stage and the head'
    """
    if name not in STRATEGIES:
        advice = did_you_mean(name, STRATEGIES)
        raise ValueError(f"{advice}expected a strategy out of {', '.join(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name]
