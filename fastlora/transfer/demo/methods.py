"""What the demo compares, and on which pictures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlora.transfer.strategies import find_strategy


@dataclass(frozen=True)
class Method:
    """A way to train that the demo compares.

    Attributes:
        strategy: Name in :data:`fastlora.transfer.strategies.STRATEGIES`, which has the rates.
        folder: Where :func:`fastlora.save_adapter` writes what was trained; None if nothing is written.
        fused: Whether it brings layers that a backend of ours serves.
        settings: Fields of :class:`FinetuneSettings`.
        training: Fields of :class:`TrainSettings`.
        shown: Name for readers; empty for the strategy's title.
    """

    strategy: str
    folder: str | None = None
    fused: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    shown: str = ""

    @property
    def title(self) -> str:
        """Name for readers."""
        return self.shown or find_strategy(self.strategy).title


METHODS: dict[str, Method] = {
    "probe": Method(
        "feature_extraction",
        settings={"cache_features": True},
        training={"epochs": 100, "batch_size": 32, "weight_decay": 1e-4},
    ),
    "lora": Method("lora", "adapter", fused=True, settings={"rank": 8, "alpha": 16.0}, shown="LoRA, fused"),
    "adapter": Method("adapter", "bottleneck", fused=True),
    "prompts": Method("prompt", "prompts"),
    "full": Method("full"),
}
DEFAULT_METHODS = ("probe", "lora")


@dataclass(frozen=True)
class Recipe:
    """What the demo does with a data set.

    Attributes:
        image_size: Height and width in pixels.
        train: Number of pictures to train on.
        validation: Number of pictures to watch; the rest is for the test.
        epochs: Epochs of all methods but the probe.
    """

    image_size: int
    train: int
    validation: int
    epochs: int


RECIPES: dict[str, Recipe] = {
    "elpv": Recipe(image_size=112, train=540, validation=120, epochs=6),
    "mnist5k": Recipe(image_size=56, train=1500, validation=500, epochs=3),
}


def choose_methods(names: Iterable[str]) -> tuple[str, ...]:
    """Look up methods by name.

    Args:
        names: Out of :data:`METHODS`, or those of their strategies; ``"all"`` stands for all of them.

    Returns:
        Those named, once each, in the order of :data:`METHODS`.

    Raises:
        ValueError: An unknown name, or none.

    Example:
        >>> choose_methods(["full", "feature_extraction"])
        ('probe', 'full')
        >>> choose_methods(["all"]) == tuple(METHODS)
        True
    """
    given = list(names)
    # finetune knows the same things by the names of their strategies
    known = {method.strategy: name for name, method in METHODS.items()} | {name: name for name in METHODS}
    unknown = [name for name in given if name not in (*known, "all")]
    if unknown or not given:
        raise ValueError(
            f"expected methods out of {', '.join(METHODS)}, or all, got {unknown[0] if unknown else ''!r}; "
            "name one or more of them"
        )
    chosen = {known.get(name) for name in given}
    return tuple(name for name in METHODS if name in chosen or "all" in given)
