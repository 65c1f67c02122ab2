"""Compile every kernel of every plan for named GPUs, without having one.

Triton's cross-compiler makes the machine code; registers, spills and shared memory come from the assembler's
own report, so they are exact. The compiler and the interpreter can't share a process, so the work runs in
subprocesses: ``python -m fastlora_kernels.compile.codegen`` reads specs from standard input and prints rows,
as JSON; given a folder, it keeps there what it found, and compiles again only what has changed since.
"""

import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from fastlora_kernels.compile.specs import Spec, constants, jit_function, signature, specs
from fastlora_kernels.compiled import Row, tile_text
from fastlora_kernels.targets import TARGETS
from fastlora_kernels.tile import Tile

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# what the command line and the tests take from here
__all__ = ["DEFAULT_TARGETS", "Row", "Spec", "compile_rows", "compile_spec", "gate_specs", "specs"]
_MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"v_mfma",
}


def gate_specs() -> list[Spec]:
    """What the committed table holds and tests compile; fp16 differs from bf16 in an instruction's type."""
    wanted = [spec for name in DEFAULT_TARGETS for spec in specs(name, ("bf16", "fp32"))]
    # the same code as for sm_80, in less shared memory
    return wanted + specs("sm_86", ("bf16",))


def compile_rows(
    all_specs: Sequence[Spec], *, jobs: int | None = None, cache: Path | None = None
) -> Iterator[Row]:
    """Compile in as many subprocesses as the machine has cores and yield the rows as they come.

    Args:
        all_specs: What to compile.
        jobs: Number of subprocesses; without it, as many as the machine has cores.
        cache: A folder that keeps the rows; one is made again when its kernel, what that calls, the spec or
            Triton has changed.

    Raises:
        RuntimeError: A kernel does not compile; the message holds the compiler's.
    """
    batches = _batches(all_specs, jobs or os.cpu_count() or 1)
    results: queue.Queue[Row | Exception | None] = queue.Queue()
    workers = [
        threading.Thread(target=_run_batch, args=(batch, cache, results), daemon=True) for batch in batches
    ]
    for worker in workers:
        worker.start()
    running = len(workers)
    while running:
        result = results.get()
        if isinstance(result, Exception):
            raise result
        if result is None:
            running -= 1
        else:
            yield result


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
    options = {"num_warps": spec.tile.warps, "num_stages": spec.tile.stages}
    compiled = triton.compile(source, target=gpu, options=options)
    assembly = compiled.asm["amdgcn" if target.is_amd else "ptx"]
    registers, spills, serialized = _amd_usage(assembly) if target.is_amd else _nvidia_usage(assembly)
    tile = spec.tile
    return Row(
        kernel=spec.kernel,
        target=spec.target,
        dtype=spec.dtype,
        dropout=spec.dropout,
        aligned=spec.aligned,
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


def _batches(all_specs: Sequence[Spec], jobs: int) -> list[Sequence[Spec]]:
    return [batch for batch in (all_specs[i::jobs] for i in range(jobs)) if batch]


def _run_batch(
    batch: Sequence[Spec], cache: Path | None, results: "queue.Queue[Row | Exception | None]"
) -> None:
    """Compile a batch in one subprocess and put its rows, an error if any, then None into the queue."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [
        sys.executable,
        "-m",
        "fastlora_kernels.compile.codegen",
        *([] if cache is None else [str(cache)]),
    ]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([asdict(spec) for spec in batch]))
        process.stdin.close()
        for line in process.stdout:
            results.put(Row(**json.loads(line)))
        if process.wait() != 0:
            errors.seek(0)
            results.put(RuntimeError(f"a kernel did not compile:\n{errors.read()[-4000:]}"))
    results.put(None)


def _nvidia_usage(ptx: str) -> tuple[int, int, bool]:
    """Registers, spilled bytes and whether wgmma was serialised, from the assembler's report."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        assembler = get_ptxas(int(re.sub(r"\D", "", architecture[1]))).path
        command = [assembler, "-v", "-arch", architecture[1], str(source), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
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
    settled = repr((spec, signature(function, spec), constants(function, spec)))
    parts = [triton.__version__, function.cache_key, settled, Path(__file__).read_text("utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def main() -> None:
    """Read specs as JSON from standard input, print one row as JSON for each."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for fields in json.load(sys.stdin):
        spec = Spec(**{**fields, "tile": Tile(**fields["tile"])})
        row = compile_spec(spec) if folder is None else _cached_row(spec, folder)
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
