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
        records: Of layers alone, and of those that share their input.
        as_json: Whether as JSON on stdout instead of tables.
    """
    from fastlora_kernels.choose.tuned import Record, SharedRecord

    if as_json:
        typer.echo(json.dumps([asdict(record) for record in records], indent=1))
        return
    console = make_console()
    console.print(_table([record for record in records if isinstance(record, Record)]))
    shared = [record for record in records if isinstance(record, SharedRecord)]
    if shared:
        console.print(_shared_table(shared))


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


def _shared_table(records: "list[SharedRecord]") -> Table:
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
            us = record.microseconds[run]
            best, apart = us[name_of(won)], us.get("separate")
            gain = ("", "") if apart is None else (f"{apart:,.0f}", f"{apart / best:.2f}×")
            table.add_row(*named, run, name_of(won), f"{best:,.0f}", *gain)
    return table


def _cells(record: "Record", run: str, won: "Winners") -> list[str]:
    from fastlora.tuning.search import name_of

    shape, step = record.shape, won.microseconds["step"]
    best, eager = min(step.values()), step.get("eager")
    return [
        sizes([shape]),
        str(shape.r),
        record.dtype,
        record.weight or "dense",
        "yes" if record.dropping else "",
        run,
        name_of(won.forward),
        name_of(won.backward),
        f"{best:,.0f}",
        "" if eager is None else f"{eager:,.0f}",
        "" if eager is None else f"{eager / best:.2f}×",
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
