"""The one list of strategies."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora._core.words import look_up
from fastlora.transfer.strategies import added, freezing
from fastlora.transfer.unfreezing import GradualUnfreezing


@dataclass(frozen=True)
class Strategy:
    """A way to adapt a pretrained model.

    Attributes:
        name: What users call it, ``"lora"``, say.
        title: What tables and pictures call it, ``"LoRA"``, say.
        summary: What trains, in a few words.
        apply: Chooses what trains in a model, in place. Takes the model, the name of its head,
            ``train_batch_norm`` and the strategy's own options. A strategy that adds parameters takes None
            for the head of a model that keeps the one it has.
        lr: A learning rate to begin with, with AdamW.
        head_factor: By how much the head then learns faster.
        adds: Whether it adds parameters to a frozen model, which a small file can hold.
        unfreezing: From the number of stages and epochs to when stages begin to train, which ``apply`` leaves
            frozen; None where what trains never changes.
    """

    name: str
    title: str
    summary: str
    apply: Callable[..., None]
    lr: float
    head_factor: float
    adds: bool = False
    unfreezing: Callable[[int, int], GradualUnfreezing] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its own options, such as ``rank``.

        Example:
            >>> find_strategy("prompt").options
            ('num_tokens', 'deep')
        """
        return tuple(inspect.signature(self.apply).parameters)[3:]

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the strategy doesn't have.

        Args:
            options: Values by name.

        Raises:
            TypeError: One is unknown; those it has are listed.
        """
        unknown = [name for name in options if name not in (*self.options, "train_batch_norm")]
        if unknown:
            has = f"its options are {', '.join(self.options)}" if self.options else "it has no options"
            raise TypeError(f"expected no option {unknown[0]!r} for strategy {self.name!r}; {has}")

    def apply_to(self, model: nn.Module, head: str | None, **options: Any) -> None:
        """Apply it to a model that was chosen by its name, or say why that model can't carry it.

        Args:
            model: The model, changed in place.
            head: Name of its classifier, or None as in :attr:`apply`.
            **options: The strategy's own options, and ``train_batch_norm``.

        Raises:
            ValueError: It can't.
        """
        try:
            self.apply(model, head, **options)
        except TypeError as error:
            raise ValueError(str(error)) from error
        except ValueError as error:
            # where adapters go is nothing that can be said here
            said, advice, _ = str(error).partition("; say where adapters go")
            if not advice:
                raise
            raise ValueError(f"{said}; choose another strategy or model") from error


# pretrained weights only need a nudge; rates of the probe and of LoRA were chosen on validation pictures of
# solar cells, the others are first choices
STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("feature_extraction", "Linear probe", "the head on frozen features",
                 freezing.feature_extraction, 3e-3, 1.0),
        Strategy("fine_tuning", "Last layers", "the last stage and the head",
                 freezing.fine_tuning, 1e-4, 30.0),
        Strategy("full", "Full fine-tuning", "everything",
                 freezing.full, 3e-5, 100.0),
        Strategy("gradual", "Gradual unfreezing", "the head, then stage after stage",
                 freezing.feature_extraction, 3e-5, 100.0, unfreezing=freezing.gradually),
        Strategy("lp_ft", "Probe, then full", "the head, then everything",
                 freezing.feature_extraction, 3e-5, 100.0, unfreezing=freezing.after_the_probe),
        Strategy("lora", "LoRA", "low-rank updates of every layer and the head",
                 added.lora, 5e-4, 10.0, adds=True),
        Strategy("adapter", "Adapters", "bottleneck adapters in every block and the head",
                 added.adapter, 1e-3, 5.0, adds=True),
        Strategy("prompt", "Prompts", "learned tokens before every block and the head",
                 added.prompt, 1e-2, 0.5, adds=True),
    )
}  # fmt: skip


def find_strategy(name: str) -> Strategy:
    """A strategy by its name.

    Raises:
        ValueError: There is none; near names are listed first.

    Example:
        >>> find_strategy("fine_tuning").summary
        'the last stage and the head'
    """
    return look_up(name, STRATEGIES, "a strategy")
