"""``fastlora kernels``: what the compiler makes of every kernel, for GPUs that need not be here."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fastlora._core.files import write_file
from fastlora.cli._console import make_console
from fastlora.cli._progress import LiveReporter

if TYPE_CHECKING:
    from fastlora_kernels.compiled import Row


def kernels(
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU to compile for, for instance sm_90; repeat it for several. Without it sm_80, sm_90, "
            "sm_100 and gfx942."
        ),
    ] = None,
    # as it was called before plan and bench had --gpu
    target: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
    write_table: Annotated[
        Path | None,
        typer.Option(help="Compile what the tests' gate compiles, and write it to this file: codegen.csv."),
    ] = None,
) -> None:
    """Compile every kernel of every launch plan and show what it takes on the GPU. No GPU is needed.

    Registers and spills (bytes written to memory for want of registers) are per thread, shared memory is per
    program. Exit code 1 when a kernel spills or its shared memory does not fit.

    [bold]Example[/bold]: fastlora kernels --gpu sm_90
    """
    targets = [*(gpu or ()), *(target or ())]
    if write_table is not None and targets:
        raise ValueError("expected either --gpu or --write-table, got both: a table holds every GPU")
    rows = _compile(targets, write_table is not None, make_console(to_stderr=True))
    if write_table is not None:
        _write_table(rows, write_table)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        make_console().print(_table(rows))
    if not all(_fits(row) for row in rows):
        raise typer.Exit(1)


def _compile(targets: list[str], for_table: bool, console: Console) -> "list[Row]":
    # slow to import
    from fastlora._core.backend import triton_available

    if not triton_available():
        raise ImportError("compiling kernels needs the package triton: pip install triton")
    from fastlora_kernels.compile import codegen
    from fastlora_kernels.compile.gate import gate_specs

    named = targets or codegen.DEFAULT_TARGETS
    specs = gate_specs() if for_table else [spec for name in named for spec in codegen.specs(name)]
    rows = []
    with LiveReporter(console) as reporter:
        for row in codegen.compile_rows(specs):
            rows.append(row)
            reporter.show("compiling", len(rows), len(specs))
    return sorted(rows, key=lambda row: (row.target, row.kernel, row.dtype, row.tile, row.dropout))


def _write_table(rows: "list[Row]", path: Path) -> None:
    import triton

    from fastlora_kernels.compile.table import table_text

    write_file(path, table_text(rows, triton.__version__).encode())


def _fits(row: "Row") -> bool:
    from fastlora_kernels.targets import TARGETS

    return row.spills == 0 and row.shared_bytes <= TARGETS[row.target].shared_bytes


def _aligned(row: "Row") -> str:
    return "" if not row.aligned else "yes" if row.rank_aligned else "not the rank"


def _table(rows: "list[Row]") -> Table:
    table = Table(
        caption="Dtype: layer's, adapter's. Tile: output rows × columns × depth of a step, ranks at a time."
    )
    table.add_column("Kernel")
    for heading in ("Target", "Dtype", "Dropout", "Aligned", "Activation", "Tile"):
        table.add_column(heading)
    for heading in ("Warps", "Stages", "Registers", "Spills", "Shared", "Matrix instructions"):
        table.add_column(heading, justify="right")
    for row in rows:
        instructions = ", ".join(f"{count} {kind}" for kind, count in row.matrix_instructions.items())
        table.add_row(
            row.kernel + (f" without {row.absent}" if row.absent else ""),
            row.target,
            row.dtype if row.adapter_dtype == row.dtype else f"{row.dtype}, {row.adapter_dtype}",
            "yes" if row.dropout else "",
            _aligned(row),
            row.activation,
            row.tile,
            *map(str, (row.warps, row.stages, row.registers, row.spills)),
            f"{row.shared_bytes:,}",
            instructions + (" serialised" if row.serialized else ""),
            style=None if _fits(row) else "red",
        )
    return table
