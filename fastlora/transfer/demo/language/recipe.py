"""How the demo trains a language model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How both candidates train.

    Attributes:
        steps: Optimiser steps.
        tokens: Length of a row, which dialogues are packed into; a step takes one row.
        rank: Rank of the LoRA updates.
        alpha: Scale of the LoRA update, times rank.
        learning_rate: AdamW's first, which falls to zero in a line.
        test: How many dialogues are held out.
        asked: How many of these are asked before and after.
        seed: Seed of the split, the order and the first A.
    """

    steps: int = 30
    tokens: int = 512
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    test: int = 60
    asked: int = 3
    seed: int = 0
