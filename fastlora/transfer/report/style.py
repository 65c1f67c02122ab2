"""How every figure of a report looks: one palette, a line for each series, dark on white."""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastlora._core.words import shortened

# Okabe and Ito's palette: told apart with any colour vision
BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
BLACK, ORANGE, SKY, YELLOW = "#000000", "#E69F00", "#56B4E9", "#F0E442"
PALETTE = (BLUE, VERMILION, GREEN, PINK, BLACK, ORANGE, SKY, YELLOW)
# of what is no series of its own
GREY, DARK = "#999999", "#444444"
INK, GRID = "#222222", "#cccccc"

# colour, marker and kind of line: nobody depends on colours alone
Series = tuple[str, str, str]
SERIES: tuple[Series, ...] = tuple(zip(PALETTE[:5], "os^Dv", ("-", "--", "-.", ":", "-"), strict=True))

_LONGEST_NAME = 24
# pixels of a figure, whatever it shows
_LARGEST = 24e6


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def plain(axes: Axes, *, grid: Literal["x", "y", "both"] = "both") -> None:
    """Dark text, a light grid behind the data, no frame where nothing is read off."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)


def heading(axes: Axes, text: str) -> None:
    """A panel's heading."""
    axes.set_title(text, loc="left", color=INK, fontsize=10, fontweight="bold")


def headline(figure: Figure, text: str) -> None:
    """A figure's title, above all panels."""
    figure.suptitle(text, color=INK, fontsize=13)


def draw_line(
    axes: Axes, epochs: Sequence[float], values: Sequence[float], label: str, style: Series
) -> None:
    """A line over the epochs, of this colour, marker and kind."""
    colour, marker, line = style
    axes.plot(
        epochs,
        values,
        label=label,
        color=colour,
        marker=marker,
        linestyle=line,
        markersize=4,
        markevery=marked(len(epochs)),
    )


def finish_epochs(axes: Axes, epochs: Sequence[int], chosen: int, name: str) -> None:
    """What all panels over the epochs have: whole numbers below, the chosen epoch marked, a legend.

    Args:
        axes: A panel with its lines.
        epochs: Numbers of the epochs.
        chosen: Number of the epoch to mark.
        name: What the legend calls it.
    """
    axes.axvline(chosen, color=GREY, linestyle=":", label=f"{name} ({chosen})")
    axes.set(xlabel="Epoch", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    plain(axes)
    axes.legend(fontsize=9)


def marked(epochs: int) -> int:
    """Every how many epochs a line has a marker: a single one has its own, of many not all do."""
    return max(1, epochs // 10)


def drawn(name: str, length: int = _LONGEST_NAME) -> str:
    r"""A name as a figure's text: not too long, a dollar no formula, no underscore that hides it in legends.

    Example:
        >>> drawn("_$5^$"), drawn("a name that is longer than most", 15)
        (' _\\$5^\\$', 'a name …an most')
    """
    text = shortened(name, length).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def png(figure: Figure, dpi: float = 150) -> bytes:
    """A figure as a PNG; of a very large one each inch has fewer pixels."""
    width, height = figure.get_size_inches()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # of what the font lacks boxes are drawn; the page beside has the names
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=min(dpi, math.sqrt(_LARGEST / (width * height))))
    return buffer.getvalue()
