"""Features of two domains drawn in two dimensions, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from fastlora._core.extras import require
from fastlora.transfer.report.style import GREY, PALETTE, drawn, heading, new_figure

_DRAWN = 400
_MARKERS = {"source": "o", "target": "x"}


@dataclass(frozen=True)
class Cloud:
    """Features of both domains and the class that each point is coloured by.

    Attributes:
        title: What the features are, for the panel's heading.
        source: Features of the source ``[n, F]``.
        target: Features of the target ``[m, F]``.
    """

    title: str
    source: Tensor
    target: Tensor


def draw_embedding(
    clouds: Sequence[Cloud],
    source_classes: Tensor,
    target_classes: Tensor,
    names: Sequence[str],
    *,
    target_note: str,
    seed: int,
) -> Figure:
    """t-SNE (van der Maaten & Hinton 2008, JMLR 9) of at most 400 examples of each domain, a panel a cloud.

    Args:
        clouds: Features of the same examples, a panel each.
        source_classes: Classes of the source's examples, int64 ``[n]``.
        target_classes: Classes of the target's examples, int64 ``[m]``.
        names: Names of the classes.
        target_note: Where the target's classes come from, for the legend.
        seed: Seed that chooses the examples and begins the optimisation.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(source_classes), generator=generator)[:_DRAWN]
    others = torch.randperm(len(target_classes), generator=generator)[:_DRAWN]
    figure = new_figure(5.4 * len(clouds), 5.2)
    for axes, cloud in zip(np.atleast_1d(figure.subplots(1, len(clouds))), clouds, strict=True):
        placed = _placed(torch.cat([cloud.source[rows], cloud.target[others]]), seed)
        _scatter(axes, placed[: len(rows)], source_classes[rows], "source")
        _scatter(axes, placed[len(rows) :], target_classes[others], "target")
        heading(axes, cloud.title)
        axes.set(xticks=[], yticks=[])
    figure.legend(handles=_legend(names, target_note), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _placed(features: Tensor, seed: int) -> Tensor:
    manifold = require(
        "sklearn.manifold", distribution="scikit-learn", purpose="the embedding", extra="domain"
    )
    # the perplexity has to stay below the number of points
    perplexity = min(30.0, max(2.0, (len(features) - 1) / 3))
    scale = features.double().std().clamp_min(1e-12)
    embedding = manifold.TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return torch.from_numpy(embedding.fit_transform((features.double() / scale).numpy()))


def _scatter(axes: Axes, points: Tensor, classes: Tensor, domain: str) -> None:
    colours = [PALETTE[int(label) % len(PALETTE)] for label in classes]
    axes.scatter(
        points[:, 0].numpy(),
        points[:, 1].numpy(),
        c=colours,
        marker=_MARKERS[domain],
        s=14,
        alpha=0.6,
        linewidths=1,
    )


def _legend(names: Sequence[str], target_note: str) -> list[Line2D]:
    domains = [
        Line2D([], [], color=GREY, linestyle="", marker=marker, label=label)
        for marker, label in (("o", "source"), ("x", f"target ({target_note})"))
    ]
    if len(names) > len(PALETTE):
        # a colour that stands for several classes has no name
        return [
            *domains,
            Line2D([], [], linestyle="", label=f"{len(names)} classes in {len(PALETTE)} colours"),
        ]
    return domains + [
        Line2D([], [], color=colour, linestyle="", marker="s", label=drawn(name))
        for colour, name in zip(PALETTE, names, strict=False)
    ]
