"""Candidates and cases in the report: their names, their colours, their order."""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure

from fastlora.bench.results import EAGER_MODE, GRAPHS, Row
from fastlora.transfer.report.style import (
    BLACK,
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    YELLOW,
)

# a candidate has its colour in every figure
COLOURS = {
    "fastlora": BLUE,
    "fastlora_compiled": SKY,
    "reference": GREY,
    "peft": VERMILION,
    "peft_same_dtype": ORANGE,
    "peft_compiled": PINK,
    "addmm": GREEN,
    "compiled": PINK,
    "adapterhub": BLACK,
    "separate": SKY,
    "products": DARK,
    "frozen": DARK,
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
    "separate": "fastlora, layer by layer",
    "products": "bare products",
    "frozen": "frozen layer",
}
PASSES = {"forward_backward": "forward + backward", "forward": "forward", "step": "training step"}
SUITES = {
    "layers": "LoRA layers",
    EAGER_MODE: "LoRA layers, one call after another",
    GRAPHS: "LoRA layers as CUDA graphs",
    "adapters": "Bottleneck adapters",
    "steps": "Training steps",
    "memory": "Memory",
}


def label(candidate: str) -> str:
    """A candidate's name for people."""
    return LABELS.get(candidate, candidate)


def colour(candidate: str) -> str:
    """A candidate's colour."""
    return COLOURS.get(candidate, YELLOW)


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
