"""The chunked loss's operands, heads and steps, and the loss of all logits at once beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS, HIDDEN, CLASSES = (3, 11), 16, 50
# a head of its parameters
Head = Callable[[Tensor, list[Tensor]], Tensor]


def linear(rows: Tensor, parameters: list[Tensor]) -> Tensor:
    return F.linear(rows, *parameters)


def capped(rows: Tensor, parameters: list[Tensor]) -> Tensor:
    return 3 * torch.tanh(F.linear(rows, *parameters) / 3)


def eager(hidden: Tensor, labels: Tensor, head: Any, *, num_items: Any = None) -> Tensor:
    """All logits at once, as transformers does it."""
    logits, wanted = head(hidden.flatten(0, -2)), labels.flatten()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if num_items is None:
        return F.cross_entropy(logits, wanted)
    total: Tensor = F.cross_entropy(logits, wanted, reduction="sum") / num_items
    return total


SHAPES = {"linear": ((CLASSES, HIDDEN),), "bias": ((CLASSES, HIDDEN), (CLASSES,))}
SHAPES["lora"] = (*SHAPES["bias"], (4, HIDDEN), (CLASSES, 4))


def numbers(shapes: str, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and the head's parameters."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((*ROWS, HIDDEN), *SHAPES[shapes])]
    return [(each if index == 0 else each / 2).to(dtype) for index, each in enumerate(made)]


def labels() -> Tensor:
    """The last of each text, and some others, don't count."""
    made = torch.randint(0, CLASSES, ROWS, generator=torch.Generator().manual_seed(1))
    made[:, -1] = made[1, :4] = -100
    return made


def step(loss_of: Any, head: Head, operands: list[Tensor], frozen: int = 0, **options: Any) -> list[Tensor]:
    """The loss and the gradients of what trains."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    for parameter in leaves[1 : 1 + frozen]:
        parameter.requires_grad_(False)
    hidden, *parameters = leaves
    named = () if loss_of is eager else (parameters,)
    loss = loss_of(hidden, labels(), lambda rows: head(rows, parameters), *named, **options)
    # the mean of four steps
    gradients = torch.autograd.grad(loss / 4, [leaf for leaf in leaves if leaf.requires_grad])
    return [loss.detach(), *gradients]
