"""``fastlora kernels``: what it prints and how it ends. The compiler itself is tested in test_codegen."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton", reason="compiling kernels needs Triton")

import triton

from fastlora.cli import app
from fastlora_kernels import compiled
from fastlora_kernels.compile import codegen, gate
from fastlora_kernels.compile.codegen import Spec
from fastlora_kernels.compile.table import table_text
from fastlora_kernels.compiled import Row

KEYS = {"kernel", "target", "dtype", "tile", "warps", "stages", "registers", "spills", "shared_bytes"}


@pytest.fixture
def one_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile one small kernel for each target instead of all."""
    all_specs = codegen.specs

    def first(target: str) -> list[Spec]:
        return [spec for spec in all_specs(target) if spec.kernel == "lora_grad_a"][:1]

    monkeypatch.setattr(codegen, "specs", first)


@pytest.mark.usefixtures("one_spec")
def test_json_is_all_there_is_on_stdout() -> None:
    result = CliRunner().invoke(app, ["kernels", "--gpu", "sm_90", "--gpu", "gfx942", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["target"] for row in rows] == ["gfx942", "sm_90"]
    assert all(row.keys() >= KEYS | {"matrix_instructions"} for row in rows)
    assert all(row["registers"] > 0 and row["shared_bytes"] > 0 for row in rows)


@pytest.mark.full
@pytest.mark.usefixtures("one_spec")
def test_table() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["kernels", "--target", "sm_80"])
    assert result.exit_code == 0, result.output
    assert "lora_grad_a" in result.stdout
    assert "Registers" in result.stdout


@pytest.mark.usefixtures("one_spec")
@pytest.mark.parametrize("change", [{"spills": 4}, {"shared_bytes": 10**6}], ids=["spills", "shared"])
def test_exit_code_tells_a_kernel_that_does_not_fit(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row(
        kernel="lora_down",
        target="sm_90",
        dtype="bf16",
        adapter_dtype="fp32",
        absent="",
        dropout=False,
        aligned=True,
        rank_aligned=True,
        activation="",
        tile="64×16×128, 16",
        warps=4,
        stages=3,
        registers=61,
        spills=0,
        shared_bytes=100,
        matrix_instructions={"wgmma": 8},
        serialized=False,
    )

    def rows(specs: Sequence[Spec]) -> Iterator[Row]:
        yield replace(row, **change)

    monkeypatch.setattr(codegen, "compile_rows", rows)
    assert CliRunner().invoke(app, ["kernels", "--target", "sm_90"]).exit_code == 1


def test_unknown_target_is_bad_input() -> None:
    result = CliRunner().invoke(app, ["kernels", "--target", "sm_1"])
    assert result.exit_code == 2
    assert "expected a target out of sm_80" in result.stderr


def test_a_table_is_written_of_what_the_gate_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = compiled.committed()[1][0]
    monkeypatch.setattr(gate, "gate_specs", lambda: ["a spec"])
    monkeypatch.setattr(codegen, "compile_rows", lambda specs: iter([row] * len(specs)))
    table = tmp_path / "table.csv"
    result = CliRunner().invoke(app, ["kernels", "--write-table", str(table)])
    assert result.exit_code == 0, result.output
    assert table.read_text() == table_text([row], triton.__version__)
    both = CliRunner().invoke(app, ["kernels", "--write-table", str(table), "--target", "sm_90"])
    assert both.exit_code == 2
    assert "either --gpu or --write-table" in both.stderr
