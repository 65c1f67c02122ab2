"""Compile every kernel of every plan for named GPUs, without having one.

Triton's cross-compiler makes the machine code; registers, spills and shared memory come from the assembler's
own report, so they are exact. The compiler and the interpreter can't share a process, so the work runs in
processes of its own; given a folder, they keep there what they found, and compile again only what has changed
since.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from fastlora_kernels.compile.specs import (
    Spec,
    compiler_options,
    constants,
    jit_function,
    signature,
    specs,
)
from fastlora_kernels.compiled import Row, tile_text
from fastlora_kernels.targets import TARGETS

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# what the command line and the tests take from here
__all__ = ["DEFAULT_TARGETS", "Row", "Spec", "compile_rows", "compile_spec", "specs"]
_MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"v_mfma",
}


def compile_rows(
    all_specs: Sequence[Spec], *, jobs: int | None = None, cache: Path | None = None
) -> Iterator[Row]:
    """Compile in several processes and yield the rows as they come.

    Args:
        all_specs: What to compile.
        jobs: Number of processes; without it, as many as the machine has cores.
        cache: A folder that keeps the rows; one is made again when its kernel, what that calls, the spec or
            Triton has changed.

    Raises:
        RuntimeError: A kernel does not compile; the message holds the compiler's.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_switch_interpreter_off)
    try:
        for done in as_completed([pool.submit(_compiled_row, spec, cache) for spec in all_specs]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def compile_spec(spec: Spec) -> Row:
    """Compile one spec in this process, which must not have the interpreter on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = jit_function(spec)
    types, aligned = signature(function, spec)
    target = TARGETS[spec.target]
    source = ASTSource(function, types, constexprs=constants(function, spec), attrs=aligned)
    gpu = (
        GPUTarget("hip", target.name, 64)
        if target.is_amd
        else GPUTarget("cuda", int(target.name.removeprefix("sm_")), 32)
    )
    said = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        # what is found compiled already has no report
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=gpu, options=compiler_options(spec))
    assembly = compiled.asm["amdgcn" if target.is_amd else "ptx"]
    registers, spills, serialized = _amd_usage(assembly) if target.is_amd else _nvidia_usage(said.getvalue())
    tile = spec.tile
    return Row(
        kernel=spec.kernel,
        target=spec.target,
        dtype=spec.dtype,
        adapter_dtype=spec.adapter_dtype,
        absent=" ".join(spec.absent),
        dropout=spec.dropout,
        aligned=spec.aligned,
        rank_aligned=spec.rank_aligned,
        activation=spec.activation,
        tile=tile_text(tile),
        warps=tile.warps,
        stages=tile.stages,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=_matrix_instructions(assembly),
        serialized=serialized,
    )


def _switch_interpreter_off() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compiled_row(spec: Spec, cache: Path | None) -> Row:
    try:
        return compile_spec(spec) if cache is None else _cached_row(spec, cache)
    # whatever it is, other processes may not be able to read it
    except Exception as error:
        raise RuntimeError(f"{spec} did not compile:\n{error}") from None


def _nvidia_usage(report: str) -> tuple[int, int, bool]:
    """Registers, spilled bytes and whether wgmma was serialised, from the assembler's report."""
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers is not None
    assert spills is not None
    return int(registers[1]), max(int(spills[1]), int(spills[2])), "serialized" in report


def _amd_usage(assembly: str) -> tuple[int, int, bool]:
    registers, spilled = (
        re.search(rf"\.vgpr_{what}:\s+(\d+)", assembly) for what in ("count", "spill_count")
    )
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    assert registers is not None
    assert spilled is not None
    assert scratch is not None
    return int(registers[1]), max(4 * int(spilled[1]), int(scratch[1])), False


def _matrix_instructions(assembly: str) -> dict[str, int]:
    counts = {kind: len(re.findall(pattern, assembly)) for kind, pattern in _MATRIX_INSTRUCTIONS.items()}
    return {kind: count for kind, count in counts.items() if count}


def _cached_row(spec: Spec, folder: Path) -> Row:
    """The row that :func:`compile_spec` makes, or made of the same code before."""
    file = folder / f"{_fingerprint(spec)}.json"
    try:
        return Row(**json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        row = compile_spec(spec)
    # renamed into place: several processes may share the folder
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(row)), "utf-8")
    part.replace(file)
    return row


def _fingerprint(spec: Spec) -> str:
    """A hash of what a row hangs on: the kernel, what it calls and is given, the compiler, this code."""
    import triton

    function = jit_function(spec)
    settled = repr((spec, signature(function, spec), constants(function, spec), compiler_options(spec)))
    parts = [triton.__version__, function.cache_key, settled, Path(__file__).read_text("utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
