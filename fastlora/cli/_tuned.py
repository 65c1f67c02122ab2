"""What ``fastlora tune`` prints: tables of what was measured, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from fastlora.cli._console import make_console

if TYPE_CHECKING:
    from fastlora_kernels.choose.tuned import AnyRecord, Record, SharedRecord, Winners
    from fastlora_kernels.tile import Shape


def print_records(records: "list[AnyRecord]", as_json: bool) -> None:
    """Print what was measured.

    Args:
        records: What was measured of layers alone, and of those that share their input.
        as_json: Whether as JSON on stdout instead of tables.
    """
    from fastlora_kernels.choose.tuned import Record, SharedRecord

    if as_json:
        typer.echo(json.dumps([_as_json(record) for record in records], indent=1))
        return
    console = make_console()
    alone = [record for record in records if isinstance(record, Record)]
    console.print(_table(alone))
    shared = [record for record in records if isinstance(record, SharedRecord)]
    if shared:
        console.print(_shared_table(shared, alone))


def _as_json(record: "AnyRecord") -> dict[str, Any]:
    from fastlora_kernels.choose.shared import joined
    from fastlora_kernels.choose.tuned import SharedRecord

    if isinstance(record, SharedRecord):
        # as one layer of all outputs and ranks
        return {"kind": "shared", "shape": asdict(joined(record.shapes)), **asdict(record)}
    return {"kind": "layer", **asdict(record)}


def _table(records: "list[Record]") -> Table:
    table = Table(
        caption="Medians: graph, of CUDA graphs with a cold cache; host, where Python launches every kernel. "
        "Shape: rows × inputs × outputs."
    )
    for heading in ("Shape", "Rank", "Dtype", "Weight", "Dropout", "Run", "Forward", "Backward"):
        table.add_column(heading)
    for heading in ("µs", "Eager µs", "Gain"):
        table.add_column(heading, justify="right")
    for record in records:
        for run, won in (("graph", record.in_graph), ("host", record.from_host)):
            if won is not None:
                table.add_row(*_cells(record, run, won))
    return table


def _shared_table(records: "list[SharedRecord]", alone: "list[Record]") -> Table:
    from fastlora.tuning.search import name_of

    table = Table(
        caption="Layers that share their input, backward. One by one: each as it is alone, and their sums."
    )
    for heading in ("Shape", "Rank", "Dtype", "Dropout", "Run", "Backward"):
        table.add_column(heading)
    for heading in ("µs", "One by one", "Gain"):
        table.add_column(heading, justify="right")
    for record in records:
        named = (sizes(record.shapes), ranks(record.shapes), record.dtype, "yes" if record.dropping else "")
        for run, won in (("graph", record.in_graph), ("host", record.from_host)):
            us = record.microseconds.get(run, {})
            best, apart = us.get(name_of(won)), us.get("separate")
            gain = (
                "not taken: eager won for a layer" if _eager_won(record, run, alone) else _gain(apart, best)
            )
            table.add_row(*named, run, name_of(won), _us(best), _us(apart), gain)
    return table


def _eager_won(record: "SharedRecord", run: str, alone: "list[Record]") -> bool:
    """Whether the eager formula is taken for one of these layers by itself, so that all are apart."""
    from fastlora_kernels.choose.tuned import REFERENCE

    of_layers = [
        each.in_graph if run == "graph" or each.from_host is None else each.from_host
        for each in alone
        if each.shape in record.shapes
        and (each.dtype, each.dropping, each.weight) == (record.dtype, record.dropping, None)
    ]
    return any(won.forward.path == REFERENCE for won in of_layers)


def _us(time: float | None) -> str:
    return "" if time is None else f"{time:,.0f}"


def _gain(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}×" if before and after else ""


def _cells(record: "Record", run: str, won: "Winners") -> list[str]:
    from fastlora.tuning.search import name_of

    shape, step = record.shape, won.microseconds.get("step", {})
    best, eager = min(step.values(), default=None), step.get("eager")
    return [
        sizes([shape]),
        str(shape.r),
        record.dtype,
        record.weight or "dense",
        "yes" if record.dropping else "",
        run,
        name_of(won.forward),
        name_of(won.backward),
        _us(best),
        _us(eager),
        _gain(eager, best),
    ]


def sizes(shapes: "Sequence[Shape]") -> str:
    """Rows, inputs and the outputs of each layer.

    Args:
        shapes: Sizes of each layer's call.
    """
    return f"{shapes[0].m} × {shapes[0].k} × {' + '.join(str(shape.n) for shape in shapes)}"


def ranks(shapes: "Sequence[Shape]") -> str:
    """One rank for all, or each layer's.

    Args:
        shapes: Sizes of each layer's call.
    """
    each = [str(shape.r) for shape in shapes]
    return " + ".join(each) if len({*each}) > 1 else each[0]
