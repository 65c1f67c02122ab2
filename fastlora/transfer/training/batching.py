"""Cuts the examples of an epoch into batches; the last one never has a single example.

A BatchNorm that trains can't normalise one example: torch refuses where it has one value per channel, and
elsewhere its statistics are those of a single picture.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # the settings count batches, and a command's --help shows the settings
    from torch import Tensor


def leaves_one(examples: int, batch_size: int) -> bool:
    """Whether one example is left over when the others fill batches.

    Example:
        >>> [leaves_one(examples, 4) for examples in (1, 5, 6, 9)]
        [False, True, False, True]
    """
    return examples > batch_size and examples % batch_size == 1


def count_batches(examples: int, batch_size: int) -> int:
    """Batches of an epoch.

    Example:
        >>> [count_batches(examples, 4) for examples in (1, 4, 5, 6, 9)]
        [1, 1, 1, 2, 2]
    """
    return -(-examples // batch_size) - leaves_one(examples, batch_size)


def cut(order: "Tensor", batch_size: int) -> "list[Tensor]":
    """Batches of ``batch_size``; the last has fewer, or one more instead of leaving one alone.

    Example:
        >>> import torch
        >>> [batch.tolist() for batch in cut(torch.arange(5), 2)]
        [[0, 1], [2, 3, 4]]
    """
    count = count_batches(len(order), batch_size)
    return list(order.tensor_split(list(range(batch_size, count * batch_size, batch_size))))
