"""The report: one HTML page that needs no other file, and its figures as PNGs beside it."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from fastlora._core.files import check_output_folder, write_file
from fastlora.bench.figures import measured_figures
from fastlora.bench.predictions import Predictions, predict
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
    load_results,
)
from fastlora.bench.roofline import measured_rows, roofline_figure
from fastlora.bench.style import SUITES, conditions, label, ordered, title
from fastlora.transfer.report.page import page
from fastlora.transfer.report.style import png

PAGE, _TEMPLATE = "report.html", "bench/report.html.jinja"
# what the first paragraph calls a suite's cases, and what nobody can beat
_SENTENCES = {
    ("layers", "forward_backward"): ("A LoRA layer's forward and backward pass", "frozen layer alone"),
    (EAGER_MODE, "forward_backward"): ("Called one after another, a LoRA layer", "frozen layer alone"),
    (GRAPHS, "forward_backward"): ("As a CUDA graph, a LoRA layer", "frozen layer alone"),
    ("adapters", "forward_backward"): ("That of a bottleneck adapter", "six bare products"),
    ("steps", "step"): ("A whole training step", "frozen model"),
}
# how a check of a card times its suites
_CHECK_TIMES = {
    EAGER_MODE: "One after another: wall time of calls in eager mode, the host's part included.",
    GRAPHS: "As CUDA graphs: GPU time, the L2 cache overwritten before each replay.",
    "steps": "Training steps: wall time of steps one after another, the host's part included.",
}
# sharp enough on a screen, small enough for a repository
_DPI, _COLOURS = 110, 128


def write_report(results_path: Path, output: Path | None = None, card: str | None = None) -> list[Path]:
    """Write the page and its figures.

    Args:
        results_path: File of ``make bench``, ``make bench-gpu`` or ``make gpu-check``.
        output: Folder for them; without it, beside the results under their name.
        card: GPU whose roof and predictions are shown; without it, that of the results, or H100.

    Returns:
        The files, the page first.

    Raises:
        FileNotFoundError: There is no results file.
        ValueError: It is of another kind or schema, or the GPU is not known.
    """
    results = load_results(results_path)
    predictions = predict(card or _card_of(results), measured_rows(results))
    folder = output or results_path.with_suffix("")
    check_output_folder(folder)
    figures = measured_figures(results)
    if predictions is not None:
        figures["roofline"] = roofline_figure(results, predictions)
    pictures = {name: _png(figure) for name, figure in figures.items()}
    written = [folder / PAGE]
    write_file(written[0], render(results, predictions, pictures).encode())
    for name, picture in pictures.items():
        written.append(folder / f"{name}.png")
        write_file(written[-1], picture)
    return written


def render(results: Results, predictions: Predictions | None, pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        results: What was measured.
        predictions: What is predicted, or None.
        pictures: PNGs by name.
    """
    return page(
        _TEMPLATE,
        label=label,
        title=title,
        conditions=conditions,
        words=_words,
        results=results,
        predictions=predictions,
        pictures=pictures,
        suites=SUITES,
        gains=gains(results),
        summary=summary(results),
        losses=results.losses(),
        check_times=[
            told for suite, told in _CHECK_TIMES.items() if suite in {r.suite for r in results.timed}
        ],
        compared=sum(_rivals(row) for row in results.timed),
        measured_roof=bool(measured_rows(results)),
        tables=[(heading, *_table(results, suite)) for suite, heading in SUITES.items()],
    )


def summary(results: Results) -> list[dict[str, Any]]:
    """What the first sentences say: all cases of a kind together."""
    found = []
    for (suite, passes), (what, ceiling) in _SENTENCES.items():
        rows = [row for row in results.timed if (row.suite, row.passes) == (suite, passes)]
        if rows:
            found.append({"what": what, "ceiling": ceiling} | _means(rows))
    return found


def gains(results: Results) -> list[dict[str, Any]]:
    """Geometric means for each suite's conditions: times over the ceiling, and speed-ups."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.timed:
        groups.setdefault((SUITES.get(row.suite, row.suite), conditions(row)), []).append(row)
    return [
        {"suite": suite, "conditions": condition} | _means(rows)
        for (suite, condition), rows in groups.items()
    ]


def _means(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "cases": len(rows),
        "ceilings": {name: _mean(_over_ceiling(row, name) for row in rows) for name in (OURS, EAGER, PEFT)},
        "speed_ups": {name: _mean(row.speed_up(name) for row in rows) for name in (EAGER, PEFT)},
    }


def _over_ceiling(row: Row, candidate: str) -> float | None:
    if row.ceiling_ms is None or candidate not in row.median_ms:
        return None
    return row.median_ms[candidate] / row.ceiling_ms


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return geometric_mean(known) if known else None


def _rivals(row: Row) -> int:
    return len([name for name in row.median_ms if name not in (OURS, "fastlora_compiled", *CEILINGS)])


def _table(results: Results, suite: str) -> tuple[list[str], list[Row]]:
    """A suite's candidates, the ceiling first, and its rows with times."""
    rows = [row for row in results.timed if row.suite == suite]
    names = {name for row in rows for name in row.median_ms}
    ceilings = [name for name in CEILINGS if name in names]
    return ceilings + [name for name in ordered(names) if name not in CEILINGS], rows


def _card_of(results: Results) -> str:
    """The card that predictions know by the device's name, or H100."""
    from fastlora_kernels.targets import card_named

    known = card_named(results.device) if results.kind == "gpu" else None
    return "H100" if known is None else known.card


def _words(value: Any) -> str:
    """An entry of the environment for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return str(value)


def _png(figure: Figure) -> bytes:
    """A PNG of few colours, a third as large as one of millions."""
    small = io.BytesIO()
    drawn = Image.open(io.BytesIO(png(figure, _DPI))).convert("RGB")
    drawn.quantize(_COLOURS, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()
