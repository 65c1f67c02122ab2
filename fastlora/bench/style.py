"""How every figure of the report looks: names and colours of candidates, dark on white."""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastlora.bench.results import Row

INK, GRID = "#222222", "#cccccc"
# Okabe and Ito's palette, told apart with any colour vision; a candidate has its colour in every figure
COLOURS = {
    "fastlora": "#0072B2",
    "fastlora_compiled": "#56B4E9",
    "reference": "#999999",
    "peft": "#D55E00",
    "peft_same_dtype": "#E69F00",
    "peft_compiled": "#CC79A7",
    "addmm": "#009E73",
    "compiled": "#CC79A7",
    "adapterhub": "#000000",
    "products": "#444444",
    "frozen": "#444444",
}
LABELS = {
    "fastlora": "fastlora",
    "fastlora_compiled": "fastlora, compiled",
    "reference": "eager formula",
    "peft": "PEFT",
    "peft_same_dtype": "PEFT, 16-bit adapters",
    "peft_compiled": "PEFT, compiled",
    "addmm": "matmul + addmm_",
    "compiled": "torch.compile of eager",
    "adapterhub": "AdapterHub",
    "products": "bare products",
    "frozen": "frozen layer",
}
PASSES = {"forward_backward": "forward + backward", "forward": "forward", "step": "training step"}
SUITES = {
    "layers": "LoRA layers",
    "adapters": "Bottleneck adapters",
    "steps": "Training steps",
    "memory": "Memory",
}


def label(candidate: str) -> str:
    """A candidate's name for people."""
    return LABELS.get(candidate, candidate)


def colour(candidate: str) -> str:
    """A candidate's colour."""
    return COLOURS.get(candidate, "#F0E442")


def ordered(candidates: Iterable[str]) -> list[str]:
    """fastlora first, then as the labels are listed, then what is not known."""
    present = set(candidates)
    return [name for name in LABELS if name in present] + sorted(present - LABELS.keys())


def conditions(row: Row) -> str:
    """Under which conditions a row was measured: rows that share them stand together."""
    threads = "" if row.threads is None else f", {row.threads} thread{'s' * (row.threads > 1)}"
    return f"{PASSES[row.passes]}, dropout {row.dropout:g}{threads}"


def title(row: Row) -> str:
    """A row's layer, size and dtype."""
    # an adapter's size says all that its name does
    parts = [row.size, row.dtype] if row.suite == "adapters" else [row.name, row.size, row.dtype]
    return ", ".join(part for part in parts if part)


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by their conditions, in the order in which they come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(conditions(row), []).append(row)
    return groups


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in the report's fonts' sizes."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def plain(axes: Axes, *, grid: str = "x") -> None:
    """Dark text, a light grid behind the data, no frame where nothing is read off."""
    axes.set_axisbelow(True)
    if grid == "both":
        axes.grid(color=GRID, linewidth=0.6)
    else:
        axes.grid(axis="x" if grid == "x" else "y", color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)


def heading(axes: Axes, text: str) -> None:
    """A panel's heading."""
    axes.set_title(text, loc="left", color=INK, fontsize=10, fontweight="bold")


def legend_below(figure: Figure, handles: Mapping[str, Any], columns: int = 4) -> None:
    """One legend for all panels."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=9,
    )
