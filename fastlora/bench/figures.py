"""The report's figures of what was measured: speed-ups, overheads, memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from fastlora.bench.results import (
    CEILINGS,
    EAGER,
    EAGER_MODE,
    GRAPHS,
    OURS,
    PEFT,
    Results,
    Row,
    geometric_mean,
)
from fastlora.bench.style import PASSES, SUITES, colour, grouped, label, legend_below, ordered, title
from fastlora.transfer.report.style import INK, drawn, heading, headline, new_figure, plain

_BAR_INCHES, _PANEL_INCHES = 0.24, 0.75
_MIB = 2**20
# of a figure; the page has a table with all of them
_MOST_CASES, _LONGEST = 120, 48
_FINE_TICKS = [0.5, 0.7, 1, 1.2, 1.5, 2, 3, 4, 6]
_COARSE_TICKS = [0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]


def measured_figures(results: Results) -> dict[str, Figure]:
    """Every figure that the results have data for, by the name of its file."""
    made = {
        f"speedup-{suite}-{passes}".replace("_", "-"): speed_up_figure(results, suite, passes)
        for suite in SUITES
        for passes in PASSES
    }
    made |= {
        f"overhead-{suite}": overhead_figure(results, suite)
        for suite in ("layers", EAGER_MODE, GRAPHS, "adapters", "steps")
    }
    made |= {
        f"memory-{name}": memory_figure(results, suite)
        for name, suite in (("layers", "memory"), ("steps", "steps"))
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def speed_up_figure(results: Results, suite: str, passes: str) -> Figure | None:
    """Bars: how many times faster fastlora is than PEFT and than the eager formula, by case."""
    rows = [row for row in results.timed if (row.suite, row.passes) == (suite, passes)]
    rows, left_out = rows[:_MOST_CASES], _left_out(rows)
    rivals = [name for name in (PEFT, EAGER) if any(row.speed_up(name) for row in rows)]
    if not rivals:
        return None
    groups = grouped(rows)
    heights = [_PANEL_INCHES + _BAR_INCHES * len(group) for group in groups.values()]
    figure = new_figure(10, sum(heights) + 0.7)
    panels = figure.subplots(
        len(groups), len(rivals), squeeze=False, sharex="col", sharey="row", height_ratios=heights
    )
    for line, (condition, group) in zip(panels, groups.items(), strict=True):
        for axes, rival in zip(line, rivals, strict=True):
            _speed_up_bars(axes, group, rival)
        heading(line[0], condition)
    for axes, rival in zip(panels[-1], rivals, strict=True):
        axes.set_xlabel(f"Speed-up over {_over(rival)} (×)")
    for axes, rival in zip(panels[0], rivals, strict=True):
        largest = max(value for row in rows if (value := row.speed_up(rival)))
        axes.set_xlim(0, 1.16 * max(largest, 1.0))
    names = " and ".join(_over(rival) for rival in rivals)
    headline(figure, f"{SUITES[suite]}: fastlora's speed-up over {names}{left_out}")
    faster, slower = Patch(color=colour(OURS)), _slower_patch()
    legend_below(figure, {"fastlora is faster": faster, "fastlora is slower": slower})
    return figure


def _left_out(rows: Sequence[Row]) -> str:
    return f" (the first {_MOST_CASES} of {len(rows)} cases)" if len(rows) > _MOST_CASES else ""


def _over(rival: str) -> str:
    return "PEFT" if rival == PEFT else "the eager formula"


def _slower_patch() -> Patch:
    return Patch(facecolor="white", edgecolor=colour(OURS), hatch="////")


def _speed_up_bars(axes: Axes, rows: Sequence[Row], rival: str) -> None:
    for place, row in enumerate(rows):
        value = row.speed_up(rival)
        if value is None:
            continue
        looks: dict[str, Any] = (
            {"color": colour(OURS)}
            if value >= 1
            else {"facecolor": "white", "edgecolor": colour(OURS), "hatch": "////"}
        )
        axes.barh(place, value, height=0.72, **looks)
        axes.annotate(
            f"{value:.2f}",
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            # readable on the line at 1
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [drawn(title(row), _LONGEST) for row in rows])
    # sharing an axis, both panels turn when one is turned
    axes.set_ylim(len(rows) - 0.4, -0.6)
    plain(axes, grid="x")


def overhead_figure(results: Results, suite: str) -> Figure | None:
    """Dots: each candidate's time over what nobody can beat, a dot a case, a bar at the geometric mean."""
    rows = [row for row in results.timed if row.suite == suite and row.ceiling_ms]
    if not rows:
        return None
    groups = grouped(rows)
    names = ordered(name for row in rows for name in row.median_ms if name not in CEILINGS)
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = new_figure(10, lines * (0.9 + 0.34 * len(names)) + 0.6)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (condition, group) in zip(panels, groups.items(), strict=False):
        _overhead_dots(axes, group, names)
        heading(axes, condition)
    for axes in panels[len(groups) :]:
        axes.remove()
    ceiling = "the six bare products" if suite == "adapters" else "the frozen model"
    ceiling = "the frozen layer" if suite in ("layers", EAGER_MODE, GRAPHS) else ceiling
    for axes in panels[max(0, len(groups) - columns) : len(groups)]:
        axes.set_xlabel(f"Time ÷ that of {ceiling} (logarithmic)")
        axes.tick_params(labelbottom=True)
    text = f"{SUITES[suite]}: overhead over {ceiling} (dots: cases, number and bar: geometric mean)"
    headline(figure, text)
    return figure


def _overhead_dots(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        ratios = [
            row.median_ms[name] / row.ceiling_ms for row in rows if name in row.median_ms and row.ceiling_ms
        ]
        if not ratios:
            continue
        # spread evenly within the line, so that no dot hides another
        offsets = [0.24 * (2 * (i + 0.5) / len(ratios) - 1) for i in range(len(ratios))]
        axes.scatter(ratios, [place + o for o in offsets], s=16, color=colour(name), alpha=0.65, linewidth=0)
        mean = geometric_mean(ratios)
        axes.plot([mean, mean], [place - 0.36, place + 0.36], color=colour(name), linewidth=2.5)
        axes.annotate(
            f"{mean:.2f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color=INK,
            fontweight="bold" if name == OURS else "normal",
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), [drawn(label(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    _plain_log_ticks(axes)
    plain(axes, grid="x")


def _plain_log_ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    # as many as there is room for
    ticks = _FINE_TICKS if high / low < 6 else _COARSE_TICKS
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def memory_figure(results: Results, suite: str) -> Figure | None:
    """Bars: what each candidate keeps for backward, and the most that its step holds."""
    rows = [row for row in results.rows if row.suite == suite and OURS in row.kept_bytes]
    rows, left_out = rows[:_MOST_CASES], _left_out(rows)
    if not rows:
        return None
    names = ordered({name for row in rows for name in (*row.kept_bytes, *row.peak_bytes)})
    groups = grouped(rows)
    heights = [_PANEL_INCHES + (0.2 + 0.13 * len(names)) * len(group) for group in groups.values()]
    figure = new_figure(10, sum(heights) + 1.2)
    panels = figure.subplots(len(groups), 2, squeeze=False, sharex="col", sharey="row", height_ratios=heights)
    for (kept, peak), (condition, group) in zip(panels, groups.items(), strict=True):
        _memory_bars(kept, group, [row.kept_bytes for row in group], names)
        _memory_bars(peak, group, [row.peak_bytes for row in group], names)
        heading(kept, condition)
    unit = "MiB" if suite == "steps" else "× the input's bytes"
    for column, text in enumerate(("Kept for backward", "Peak of the step")):
        panels[-1][column].set_xlabel(f"{text} ({unit})")
        largest = max(max(bar.get_width() for bar in axes.patches) for axes in panels[:, column])
        panels[0][column].set_xlim(0, 1.16 * max(largest, 1e-3))
    text = "Memory beside input, dY and weights (numbers: MiB)"
    if suite == "steps":
        text = "Memory of training steps beside inputs and weights"
    headline(figure, text + left_out)
    legend_below(figure, {drawn(label(name)): Patch(color=colour(name)) for name in names})
    return figure


def _memory_bars(
    axes: Axes, rows: Sequence[Row], amounts: Sequence[Mapping[str, int]], names: Sequence[str]
) -> None:
    height = 0.8 / len(names)
    for place, (row, amount) in enumerate(zip(rows, amounts, strict=True)):
        present = [name for name in names if name in amount]
        for number, name in enumerate(present):
            middle, value = place + height * (number - (len(present) - 1) / 2), amount[name] / _MIB
            # layers of all sizes fit one axis when measured by what they read
            scale = _MIB / row.input_bytes if row.input_bytes else 1.0
            axes.barh(middle, value * scale, height=0.9 * height, color=colour(name))
            axes.annotate(
                _short(value),
                (value * scale, middle),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axes.set_yticks(range(len(rows)), [drawn(title(row), _LONGEST) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    plain(axes, grid="x")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"
