"""What a check of a card found, in lines for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora._core.files import read_json
from fastlora.bench.results import EAGER_MODE, GRAPHS

CANDIDATES = ("frozen", "reference", "peft", "addmm", "compiled", "fastlora")
_TITLES = {
    GRAPHS: "LoRA layers, forward + backward, GPU time as CUDA graphs, µs",
    EAGER_MODE: "LoRA layers, forward + backward, one call after another, µs",
    "steps": "Training steps, ms",
}
_MOST_TOLD = 10
# of a layer's kernels
_LONGEST = 4


def summary(path: Path) -> Iterator[str]:
    """Lines about a results file."""
    told: dict[str, Any] = read_json(path)
    ran = told["environment"]
    yield f"{told['device']['name']}, torch {ran['torch']}, Triton {ran['triton']}"
    if "note" in ran:
        yield ran["note"]
    yield from _exactness(told["exactness"])
    for suite, title in _TITLES.items():
        rows = [row for row in told["rows"] if row["suite"] == suite]
        if rows:
            yield from ("", title, *_table(rows, 1.0 if suite == "steps" else 1e3))
    for each in told.get("profiles", ()):
        yield f"profile: {each['case']}: {_longest(each['kernel_us'])}"
    for each in told["failed"][:_MOST_TOLD]:
        yield f"failed: {each['case']}: {each['error']}"
    if len(told["failed"]) > _MOST_TOLD:
        yield f"and {len(told['failed']) - _MOST_TOLD} more failures, in the file"
    for each in told.get("left_out", ()):
        yield f"left out: {each['case']}: {each['error']}"
    if told.get("late"):
        yield f"not begun: {len(told['late'])} items, {told['late'][0]} the first"


def _exactness(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    wrong = [each for each in outcomes if not each["right"]]
    yield f"exactness: {len(outcomes) - len(wrong)} right, {len(wrong)} wrong"
    ratios = [
        (each["error"] / each["eager_error"], each)
        for each in outcomes
        if each.get("eager_error") and each.get("error") is not None
    ]
    if ratios:
        ratio, worst = max(ratios, key=lambda pair: pair[0])
        yield f"largest error over eager's own: {ratio:.2f} ({worst['case']}: {worst['what']})"
    for each in wrong[:_MOST_TOLD]:
        yield f"wrong: {each['case']}: {each['what']}"
    if len(wrong) > _MOST_TOLD:
        yield f"and {len(wrong) - _MOST_TOLD} more, in the file"


def _longest(kernel_us: Mapping[str, float]) -> str:
    """The kernels that take most of a call."""
    longest = sorted(kernel_us.items(), key=lambda pair: -pair[1])[:_LONGEST]
    # a library's names hold all of its templates
    told = ", ".join(f"{name[:40]} {us:,.1f} µs" for name, us in longest)
    return told or "the profiler saw no kernels"


def _table(rows: Sequence[Mapping[str, Any]], scale: float) -> Iterator[str]:
    """A line for each row: every candidate, then what was predicted and what the host takes for fastlora."""
    extra = [name for name in ("predicted_ms", "host_ms") if any(row.get(name) for row in rows)]
    heads = [*CANDIDATES, *(name.removesuffix("_ms") for name in extra)]
    width = max(len(_title(row)) for row in rows)
    yield _line("", heads, width)
    for row in rows:
        amounts = [row["median_ms"].get(name) for name in CANDIDATES]
        amounts += [row.get(name, {}).get("fastlora") for name in extra]
        cells = ["–" if amount is None else f"{amount * scale:,.1f}" for amount in amounts]
        yield _line(_title(row), cells, width)


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, p = {row['dropout']:g}"


def _line(title: str, cells: Iterable[str], width: int) -> str:
    return title.ljust(width) + "".join(cell.rjust(11) for cell in cells)
