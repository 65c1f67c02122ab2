"""What compiled kernels execute, loop by loop, as committed: ``python -m tests.ptx.counters`` writes it.

Counts are of PTX, per warp and iteration, on whole tiles: exact, the same on every machine for one Triton. A
worse one in the table is a decision that a reader of the diff can see.
"""

import argparse
import csv
import dataclasses
import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import triton

from fastlora_kernels import compile as compile_room
from fastlora_kernels.compile.specs import Spec
from fastlora_kernels.compiled import VERSION_LINE, tile_text
from tests.ptx.engine import COUNTS
from tests.ptx.execute import Outcome
from tests.ptx.executed_gpu import ExecutedGpu
from tests.ptx.program import CLASSES, Program
from tests.ptx.trial import chosen_specs
from tests.ptx.trials import try_spec

TARGETS = ("sm_80", "sm_90")
FILE = Path(compile_room.__file__).with_name("counters.csv")
# a wait for an mbarrier is a loop of its own
_SHORTEST_LOOP = 6
SPEC_KEY = ("kernel", "target", "dtype", "dropout", "activation", "one_chunk", "tile", "warps", "stages")
_KEY = (*SPEC_KEY, "part")
_COLUMNS = (*_KEY, "iterations", "instructions", *CLASSES, *COUNTS[1:])
# lower is better; which kinds of instructions they are is there to be read
_GATED = ("instructions", "barrier", "shuffle", "sectors", "waves")

Row = dict[str, str]


def counted_specs(target: str, dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Spec]:
    """What the table holds of a target: rows that can be read in wide words, and one activation.

    Args:
        target: The architecture.
        dtypes: Fewer than the table has.
    """
    chosen = [spec for dtype in dtypes for spec in chosen_specs(target, dtype)]
    return [spec for spec in chosen if spec.aligned and spec.activation in ("", "gelu")]


def key_of(spec: Spec) -> Row:
    """The columns that name a spec.

    Args:
        spec: What is launched.
    """
    named = dataclasses.asdict(spec) | {
        "dropout": int(spec.dropout), "one_chunk": int(spec.one_chunk), "tile": tile_text(spec.tile),
        "warps": spec.tile.warps, "stages": spec.tile.stages,
    }  # fmt: skip
    return {name: str(named[name]) for name in SPEC_KEY}


def count(gpu: ExecutedGpu, spec: Spec) -> list[Row]:
    """A row for each innermost loop, and one for everything else.

    Args:
        gpu: What executes.
        spec: What is launched.
    """
    outcome = try_spec(gpu, spec, ragged=False)
    key = key_of(spec)
    x, y, z = outcome.launch.grid
    warps = x * y * z * outcome.launch.warps
    loops = list(_innermost_loops(outcome.program))
    inside = {index for first, last in loops for index in range(first, last + 1)}
    outside = [index for index in range(len(outcome.counts)) if index not in inside]
    rows = [_row(key | {"part": "outside"}, outcome, outside, warps, warps)]
    for number, (first, last) in enumerate(loops, 1):
        iterations = int(outcome.counts[first, 0])
        if iterations:
            part = key | {"part": f"loop {number}"}
            rows.append(_row(part, outcome, range(first, last + 1), iterations, warps))
    return rows


def _innermost_loops(program: Program) -> Iterator[tuple[int, int]]:
    loops = sorted({(first, last) for first, last in program.loops if last - first >= _SHORTEST_LOOP})
    for first, last in loops:
        if not any(first <= start and end <= last for start, end in loops if (start, end) != (first, last)):
            yield first, last


def _row(key: Row, outcome: Outcome, part: Sequence[int], times: int, warps: int) -> Row:
    """Figures of a part of the program, of each time that a warp runs it."""
    counts = outcome.counts[[*part]]
    classes = [outcome.program.classes[index] for index in part]
    figures = {"instructions": counts[:, 0].sum()}
    for kind in CLASSES:
        figures[kind] = sum(row[0] for row, of in zip(counts, classes, strict=True) if of == kind)
    figures |= {name: counts[:, index].sum() for index, name in enumerate(COUNTS) if index}
    values = key | {"iterations": f"{times / warps:.4g}"}
    values |= {name: f"{round(int(value) / times, 2):g}" for name, value in figures.items()}
    return {name: values[name] for name in _COLUMNS}


def table_text(rows: Sequence[Row]) -> str:
    """The table as a file.

    Args:
        rows: In any order.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    ordered: list[Row] = sorted(rows, key=_key)
    writer.writerows(ordered)
    return f"{VERSION_LINE}{triton.__version__}\n{out.getvalue()}"


@functools.cache
def committed() -> tuple[str, tuple[Row, ...]]:
    """The version of Triton that made the table, and its rows."""
    version, _, rest = FILE.read_text("utf-8").partition("\n")
    return version.removeprefix(VERSION_LINE), tuple(csv.DictReader(io.StringIO(rest)))


def worse_than_committed(rows: Iterable[Row]) -> list[str]:
    """One line for every figure that is worse than the committed one, and for every part without one.

    Args:
        rows: What was counted.
    """
    before = {_key(row): row for row in committed()[1]}
    lines = []
    for row in rows:
        name, was = ", ".join(_key(row)), before.get(_key(row))
        if was is None:
            lines.append(f"{name} is not in {FILE.name}")
            continue
        for figure in _GATED:
            if float(row[figure]) > float(was[figure]):
                lines.append(f"{name}: {figure} {row[figure]}, committed {was[figure]}")
    return lines


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    # the folder that pytest keeps for these tests
    parser.add_argument("--cache", type=Path, default=Path(".pytest_cache", "d", "ptx"))
    gpu = ExecutedGpu(parser.parse_args().cache, TARGETS[0])
    gpu.install()
    rows = [row for target in TARGETS for spec in counted_specs(target) for row in count(gpu, spec)]
    FILE.write_text(table_text(rows), "utf-8")
    print(f"{FILE}: {len(rows)} rows, Triton {triton.__version__}")


if __name__ == "__main__":
    main()
