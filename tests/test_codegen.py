"""Every kernel of every plan, compiled for eight GPU targets without a GPU: a gate on what it takes."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="compiling kernels needs Triton")

import torch
import triton

from fastlora_kernels import compiled, targets
from fastlora_kernels.adapter import kernels as adapter
from fastlora_kernels.choose import plan
from fastlora_kernels.compile import codegen, table
from fastlora_kernels.compile.gate import GATE_TARGETS, gate_specs
from fastlora_kernels.compile.specs import PARAMETERS, Spec, jit_function, plain_name, signature
from fastlora_kernels.compiled import Row, tile_text
from fastlora_kernels.lora import kernels
from fastlora_kernels.quant import kernels as quant
from fastlora_kernels.shared.kernels import SHARED_DOWN

# DoRA's norm is a float32 product of float32 matrices; the others are no products at all
_NO_UNITS = {
    kernels.DORA_WEIGHT_NORM.name, kernels.DORA_GRAD_PRODUCT.name, quant.DEQUANTISE_4BIT.name,
    quant.DEQUANTISE_8BIT.name,
}  # fmt: skip
MATRIX_INSTRUCTION = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_120", "sm_121"), "mma"),
    **dict.fromkeys(("sm_100", "sm_103"), "tcgen05"),
    "sm_90": "wgmma",
    "gfx942": "mfma",
}
# on Hopper products of a masked x and a 16-bit A wait for each other where 16 doesn't divide the rank, and
# those of several layers always, which no tile mends
SERIALIZED = {
    (name, "sm_90", "bf16", "bf16", True, rank_aligned)
    for name, rank_aligned in ((kernels.LORA_DOWN.name, False), *product([SHARED_DOWN.name], (False, True)))
}


def _serialized(rows: Sequence[Row]) -> set[tuple[object, ...]]:
    return {
        (row.kernel, row.target, row.dtype, row.adapter_dtype, row.dropout, row.rank_aligned)
        for row in rows
        if row.serialized
    }


def few_specs() -> list[Spec]:
    """Every kernel, each on another target than the one before; all are launched on Hopper."""
    found: dict[tuple[str, str], Spec] = {}
    for spec in gate_specs():
        if spec.dtype == "bf16" and spec.rank_aligned:
            found.setdefault((spec.kernel, spec.target), spec)
    names = sorted({kernel for kernel, _ in found})
    return [found[name, GATE_TARGETS[index % len(GATE_TARGETS)]] for index, name in enumerate(names)]


def most_specs() -> list[Spec]:
    """Half of Hopper's, which the others are like, and a third of theirs; the committed table is of all."""
    hopper, others = (
        [spec for spec in gate_specs() if (spec.target == "sm_90") == is_hopper]
        for is_hopper in (True, False)
    )
    return [*hopper[::2], *others[::3]]


@pytest.fixture(scope="module", params=["few", pytest.param("most", marks=pytest.mark.full)])
def rows(request: pytest.FixtureRequest, kept_folder: Callable[[str], Path]) -> list[Row]:
    # a second process would start for longer than it compiles a few
    wanted, jobs = (few_specs()[::2], 1) if request.param == "few" else (most_specs(), None)
    compiled = list(codegen.compile_rows(wanted, jobs=jobs, cache=kept_folder("codegen")))
    assert len(compiled) == len(wanted)
    return compiled


def test_nothing_spills(rows: list[Row]) -> None:
    made_with = compiled.committed()[0]
    if made_with != triton.__version__:
        # Triton 3.6 for one keeps 16 bytes of an adapter's tile on sm_100 in memory
        pytest.skip(f"the tiles were chosen for Triton {made_with}, not {triton.__version__}")
    assert [row for row in rows if row.spills] == []


def test_shared_memory_fits(rows: list[Row]) -> None:
    assert [row for row in rows if row.shared_bytes > targets.TARGETS[row.target].shared_bytes] == []


def test_sixteen_bit_products_use_the_matrix_units(rows: list[Row]) -> None:
    sixteen_bit = [row for row in rows if row.dtype != "fp32" and row.kernel not in _NO_UNITS]
    without = [row for row in sixteen_bit if not row.matrix_instructions]
    bottlenecks = {kernel.name for kernel in adapter.KERNELS}
    # tiles for unaligned rows are too small for a whole warp group, and so is a rank, which comes first in dA
    # where a masked x would serialise the warp group's instruction
    aligned = [
        row
        for row in sixteen_bit
        if row.aligned
        and (row.kernel, row.dropout) != (kernels.LORA_GRAD_A.name, True)
        # a bottleneck that 16 does not divide takes the tile of unaligned rows
        and (row.rank_aligned or row.kernel not in bottlenecks)
    ]
    # too few rows for a warp group
    few = MATRIX_INSTRUCTION | dict.fromkeys(("sm_90", "sm_100", "sm_103"), "mma")
    decoding = {kernel.name for kernel in quant.DECODING.values()}

    def expected(row: Row) -> str:
        small = row.kernel in decoding and row.tile.startswith("16×")
        return (few if small else MATRIX_INSTRUCTION)[row.target]

    wrong = [row for row in aligned if expected(row) not in row.matrix_instructions]
    assert (without, wrong) == ([], [])


def test_the_large_products_keep_their_pipeline(rows: list[Row]) -> None:
    """None but those named above has its wgmma serialised, which waits for each product before the next."""
    assert _serialized(rows) <= SERIALIZED


def test_the_committed_table_is_of_what_the_gate_compiles() -> None:
    """One row of each: whoever adds a tile or a variant writes the table anew."""

    def key(spec: Spec) -> tuple[str | int, ...]:
        tile = (tile_text(spec.tile), spec.tile.warps, spec.tile.stages)
        flags = (" ".join(spec.absent), spec.dropout, spec.aligned, spec.rank_aligned)
        return (spec.kernel, spec.target, spec.dtype, spec.activation, *tile, spec.adapter_dtype, *flags)

    rows = compiled.committed()[1]
    assert Counter(row.key for row in rows) == Counter(map(key, gate_specs()))
    assert [row for row in rows if row.spills] == []
    assert _serialized(rows) == SERIALIZED


def test_a_rank_that_16_does_not_divide_is_compiled_as_such() -> None:
    """With the tile that it is launched with: on Hopper a narrower one than rank 16."""
    # the interpreter's have no types
    typed = functools.cache(triton.JITFunction)
    for spec in gate_specs():
        function = typed(jit_function(spec).fn)
        multiples = {function.params[index].name for (index,) in signature(function, spec)[1]}
        ranks = {each.name for each in function.params if plain_name(each.name) in ("R", "D")}
        assert multiples & ranks == (ranks if spec.rank_aligned else set()), spec
    for rank, width in ((8, 16), (16, 32), (32, 32), (64, 64)):
        (tile,) = plan.tiles(kernels.LORA_DOWN, rank, torch.bfloat16, targets.TARGETS["sm_90"])
        assert tile.rank == width
        assert (kernels.LORA_DOWN.name, tile, rank % 16 == 0) in {
            (spec.kernel, spec.tile, spec.rank_aligned) for spec in gate_specs() if spec.target == "sm_90"
        }


def test_every_kernel_is_there_for_every_target() -> None:
    wanted = {(spec.kernel, spec.target) for spec in gate_specs()}
    names = {kernel.name for kernel in plan.KERNELS}
    assert {kernel for kernel, _ in wanted} == names == {spec.kernel for spec in few_specs()}
    assert len(wanted) == len(GATE_TARGETS) * len(names) == len(GATE_TARGETS) * len(plan.KERNELS)
    assert {spec.target for spec in few_specs()} == {*GATE_TARGETS} == {*targets.TARGETS} - {"sm_89"}


def test_the_gate_knows_every_flag_and_parameter_of_a_kernel() -> None:
    """What a call may leave out is compiled without it, what may come in two dtypes in both."""
    hopper = [
        spec for spec in gate_specs() if (spec.target, spec.dtype, spec.aligned) == ("sm_90", "bf16", True)
    ]
    for kernel in plan.KERNELS:
        mine = [spec for spec in hopper if spec.kernel == kernel.name]
        parameters = inspect.signature(jit_function(mine[0]).fn).parameters
        flags = {name for name, each in parameters.items() if each.annotation is triton.language.constexpr}
        flags -= {name for name in flags if name.startswith(("BLOCK_", "GROUP"))}
        known = {*kernel.varies, *kernel.absent, *chain(*kernel.optional)}
        # it follows from HAS_DROPOUT; without a factor the kernel is another record
        settled = {"TRANSPOSED"} | ({"HAS_FACTOR"} if kernel is kernels.DORA_FORWARD else set())
        assert known <= flags <= known | settled, kernel.name
        assert {*chain(*kernel.optional)} == {flag for spec in mine for flag in spec.absent}
        assert (
            kernel.has_parameters
            == any(plain_name(name) in PARAMETERS for name in parameters)
            == ("bf16" in {s.adapter_dtype for s in mine})
        )


def test_a_kernel_that_does_not_compile_is_an_error() -> None:
    spec = next(spec for spec in few_specs() if spec.kernel == kernels.DORA_GRAD_PRODUCT.name)
    uneven = replace(spec, tile=replace(spec.tile, rows=48))
    with pytest.raises(RuntimeError, match=r"(?s)rows=48.*did not compile:.*power of 2"):
        list(codegen.compile_rows([uneven, spec, spec], jobs=1))


def test_a_record_settles_every_block_of_its_kernel() -> None:
    for spec in few_specs():
        kernel = next(kernel for kernel in plan.KERNELS if kernel.name == spec.kernel)
        names = inspect.signature(jit_function(spec).fn).parameters
        assert {*kernel.blocks(spec.tile)} == {name for name in names if name.startswith(("BLOCK_", "GROUP"))}


def test_a_row_is_kept_until_its_fingerprint_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = compiled.committed()[1], list[Spec]()

    def compile_spec(spec: Spec) -> Row:
        asked.append(spec)
        return before[len(asked)]

    monkeypatch.setattr(codegen, "compile_spec", compile_spec)
    monkeypatch.setattr(codegen, "_fingerprint", lambda spec: f"{spec.kernel}-{spec.target}")
    spec, *_, other = (spec for spec in gate_specs() if spec.kernel == kernels.DORA_GRAD_PRODUCT.name)
    rows = [codegen._cached_row(each, tmp_path) for each in (spec, other, spec, other)]
    assert (asked, rows) == ([spec, other], [before[1], before[2]] * 2)
    (tmp_path / f"{spec.kernel}-{spec.target}.json").write_text("{", "utf-8")
    assert codegen._cached_row(spec, tmp_path) == before[3]


def test_no_figure_is_worse_than_the_committed_one(rows: list[Row]) -> None:
    """A new table is a decision: ``fastlora kernels --write-table`` writes ``compile/codegen.csv``."""
    made_with, before = compiled.committed()
    assert before
    if made_with != triton.__version__:
        pytest.skip(f"the committed figures are Triton {made_with}'s, not {triton.__version__}'s")
    assert table.worse_than_committed(rows) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"registers": 256}, "registers 256, committed"),
        ({"spills": 4}, "spilled bytes 4, committed 0"),
        ({"shared_bytes": 10**6}, "shared bytes 1000000, committed"),
        ({"matrix_instructions": {}}, "instructions lost 1, committed 0"),
        ({"serialized": True}, "serialised True, committed False"),
        ({"warps": 16}, "is not in codegen.csv"),
        ({"adapter_dtype": "fp16"}, "is not in codegen.csv"),
        ({"absent": "HAS_WEIGHT"}, "is not in codegen.csv"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_gate_notices(change: dict[str, Any], told: str) -> None:
    before = compiled.committed()[1]
    row = next(row for row in before if row.kernel == kernels.LORA_FORWARD.name and row.matrix_instructions)
    assert table.worse_than_committed([row]) == []
    (line,) = table.worse_than_committed([replace(row, **change)])
    assert told in line


def test_a_table_reads_back_as_it_was_written() -> None:
    version, before = compiled.committed.__wrapped__()
    text = table.table_text(reversed(before), version)
    assert text == Path(table.__file__).with_name(compiled.FILE).read_text("utf-8")


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match=r"expected a target out of sm_80.*got 'sm_1'"):
        codegen.specs("sm_1")
