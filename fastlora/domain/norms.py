"""Norms with statistics of their own for each domain, and statistics of the target alone (AdaBN)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

DOMAINS = ("source", "target")
_KINDS = nn.modules.batchnorm._BatchNorm


class DomainNorm(nn.Module):
    """A norm for each domain, the target's in use unless :func:`use_domain` says otherwise.

    Args:
        source: The source's.
        target: The target's.
    """

    def __init__(self, source: nn.Module, target: nn.Module) -> None:
        """See the class."""
        super().__init__()
        self.norms = nn.ModuleDict(dict(zip(DOMAINS, (source, target), strict=True)))
        self.domain = "target"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the statistics of the domain in use."""
        out: Tensor = self.norms[self.domain](x)
        return out


class DomainBatchNorm(DomainNorm):
    """A BatchNorm for each domain with one weight and bias (Chang et al. 2019, arXiv 1906.03950, share none).

    Args:
        norm: BatchNorm with the weight, bias and statistics that both domains begin with.
    """

    def __init__(self, norm: nn.Module) -> None:
        """See the class."""
        source, target = deepcopy(norm), deepcopy(norm)
        target.weight, target.bias = source.weight, source.bias
        super().__init__(source, target)
        self.train(norm.training)


class Standardise(nn.Module):
    """Features ``[B, F]`` to zero mean and unit deviation by given statistics.

    Args:
        mean: Mean of each feature, ``[F]``.
        deviation: Standard deviation of each feature, ``[F]``; where it is almost zero it counts as 1.
        momentum: By how much a batch in train mode moves both, without gradient; 0 keeps them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, momentum: float = 0.0) -> None:
        """See the class."""
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("deviation", torch.where(deviation > 1e-6, deviation, 1.0).float())

    def forward(self, x: Tensor) -> Tensor:
        """Standardise."""
        if self.training and self.momentum:
            found = x.detach().float()
            self.mean.lerp_(found.mean(dim=0), self.momentum)
            self.deviation.lerp_(found.std(dim=0, correction=0).clamp_min(1e-6), self.momentum)
        # buffers that the next step moves must not be what autograd keeps
        return (x - self.mean.clone()) / self.deviation.clone()

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"{len(self.mean)}, momentum={self.momentum}"


def separate_batch_norms(model: nn.Module) -> None:
    """Replace every BatchNorm inside a model, in place, by one with statistics of its own for each domain.

    Args:
        model: Any model; weights of the norms are shared by both domains.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(4))
        >>> separate_batch_norms(model)
        >>> type(model[0]).__name__
        'DomainBatchNorm'
    """
    for module in list(model.modules()):
        if isinstance(module, DomainNorm):
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, _KINDS):
                setattr(module, name, DomainBatchNorm(child))


def join_norms(model: nn.Module, name: str = "target") -> None:
    """Undo :func:`separate_batch_norms`, in place: one domain's norms take the place of both.

    Args:
        model: A model with norms of each domain.
        name: The domain that stays, ``"source"`` or ``"target"``.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(4))
        >>> separate_batch_norms(model)
        >>> join_norms(model)
        >>> type(model[0]).__name__
        'BatchNorm1d'
    """
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, DomainNorm):
                setattr(module, child_name, child.norms[name])


@contextmanager
def use_domain(model: nn.Module, name: str) -> Iterator[None]:
    """Normalise with one domain's statistics inside a ``with`` block.

    Args:
        model: A model with norms of each domain, see :func:`separate_batch_norms`.
        name: ``"source"`` or ``"target"``.

    Raises:
        ValueError: There is no such domain.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(4))
        >>> separate_batch_norms(model)
        >>> with use_domain(model, "source"):
        ...     y = model(torch.ones(3, 4))
    """
    if name not in DOMAINS:
        raise ValueError(f"expected a domain out of {', '.join(DOMAINS)}, got {name!r}")
    norms = [module for module in model.modules() if isinstance(module, DomainNorm)]
    before = [norm.domain for norm in norms]
    for norm in norms:
        norm.domain = name
    try:
        yield
    finally:
        for norm, old in zip(norms, before, strict=True):
            norm.domain = old


@torch.no_grad()
def adapt_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace BatchNorm's running statistics by the target's (AdaBN, Li et al. 2016, arXiv 1603.04779).

    Everything else stays in eval mode; weights are not changed. The mean over the batches counts, each alike.

    Args:
        model: Changed in place, and left in eval mode.
        batches: Inputs of the target; of pairs the first. A single example joins the batch before.

    Returns:
        How many layers were adapted.

    Raises:
        ValueError: The model has no BatchNorm with running statistics, or there are no batches; nothing is
            changed then.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(4))
        >>> adapt_batch_norm(model, [torch.full((3, 4), 5.0)])
        1
        >>> model[0].running_mean.tolist()
        [5.0, 5.0, 5.0, 5.0]
    """
    norms = [m for m in model.modules() if isinstance(m, _KINDS) and m.track_running_stats]
    if not norms:
        raise ValueError(
            f"expected a model with BatchNorm layers, got {type(model).__name__} without any; "
            "normalise its features by domain instead"
        )
    joined = _join_single(batch[0] if isinstance(batch, tuple | list) else batch for batch in batches)
    first = next(joined, None)
    if first is None:
        raise ValueError("expected batches of the target, got none; nothing was changed")
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        # None counts every batch alike
        norm.momentum = None
        norm.train()
    try:
        for batch in chain([first], joined):
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return len(norms)


def _join_single(batches: Iterable[Any]) -> Iterator[Any]:
    # what is left over at the end: one example has no variance, and would count as much as a whole batch
    held = None
    for batch in batches:
        if isinstance(held, Tensor) and len(held) > 1 and len(batch) == 1:
            batch = torch.cat([held, batch])
        elif held is not None:
            yield held
        held = batch
    if held is not None:
        yield held
