"""Compile every kernel of every plan for named GPUs, without having one.

Triton's cross-compiler makes the machine code; registers, spills and shared memory come from the assembler's
own report, so they are exact. The compiler and the interpreter can't share a process, so the work runs in
subprocesses: ``python -m fastlora_kernels.codegen`` reads specs from standard input and prints rows, as JSON.
"""

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora_kernels import plan
from fastlora_kernels.plan import Kernel, Tile
from fastlora_kernels.targets import TARGETS, Target

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# one rank for every chunk of ranks that a plan can choose
RANKS = (16, 32, 64)
_WITH_DROPOUT: tuple[Kernel, ...] = ("lora_down", "lora_grad_x", "lora_grad_a")
_MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"v_mfma",
}


@dataclass(frozen=True)
class Spec:
    """One kernel to compile: which, for which GPU, dtype and tile, with dropout or not, aligned or not."""

    kernel: Kernel
    target: str
    dtype: str
    tile: Tile
    dropout: bool
    aligned: bool


@dataclass(frozen=True)
class Row:
    """What the compiler made of a :class:`Spec`.

    Attributes:
        tile: Block sizes as ``rows×cols×depth, rank``.
        registers: Per thread.
        spills: Bytes per thread written to memory for want of registers.
        shared_bytes: Shared memory of one program.
        matrix_instructions: Count by kind: ``wgmma``, ``tcgen05``, ``mma`` or ``mfma``.
        serialized: Whether the assembler had to serialise the ``wgmma`` pipeline.
    """

    kernel: str
    target: str
    dtype: str
    dropout: bool
    aligned: bool
    tile: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    serialized: bool


def specs(target_name: str, dtypes: Sequence[str] = tuple(DTYPES)) -> list[Spec]:
    """Every kernel and tile that a plan for this target can choose, without repeats.

    Raises:
        ValueError: The target is unknown.
    """
    target = _known_target(target_name)
    found = {
        Spec(kernel, target_name, dtype, tile, dropout, aligned)
        for kernel in plan.KERNELS
        for dtype in dtypes
        for rank in RANKS
        for aligned in (True, False)
        for tile in plan.tiles(kernel, rank, DTYPES[dtype], target, aligned=aligned)
        for dropout in ((False, True) if kernel in _WITH_DROPOUT else (False,))
    }
    return sorted(found, key=repr)


def compile_rows(all_specs: Sequence[Spec], *, jobs: int | None = None) -> Iterator[Row]:
    """Compile in as many subprocesses as the machine has cores and yield the rows as they come.

    Raises:
        RuntimeError: A kernel does not compile; the message holds the compiler's.
    """
    batches = _batches(all_specs, jobs or os.cpu_count() or 1)
    results: queue.Queue[Row | Exception | None] = queue.Queue()
    workers = [threading.Thread(target=_run_batch, args=(batch, results), daemon=True) for batch in batches]
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

    kernel = _jit_function(spec.kernel)
    signature, aligned = _signature(kernel, spec)
    target = TARGETS[spec.target]
    source = ASTSource(kernel, signature, constexprs=_constants(spec), attrs=aligned)
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
        tile=f"{tile.rows}×{tile.cols}×{tile.depth}, {tile.rank}",
        warps=tile.warps,
        stages=tile.stages,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=_matrix_instructions(assembly),
        serialized=serialized,
    )


def _known_target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"expected a target out of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def _batches(all_specs: Sequence[Spec], jobs: int) -> list[Sequence[Spec]]:
    return [batch for batch in (all_specs[i::jobs] for i in range(jobs)) if batch]


def _run_batch(batch: Sequence[Spec], results: "queue.Queue[Row | Exception | None]") -> None:
    """Compile a batch in one subprocess and put its rows, an error if any, then None into the queue."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-m", "fastlora_kernels.codegen"]
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


def _jit_function(kernel: Kernel) -> Any:
    from fastlora_kernels import lora_backward, lora_down, lora_forward

    for module in (lora_down, lora_forward, lora_backward):
        function = getattr(module, f"_{kernel}_kernel", None)
        if function is not None:
            return function
    raise ValueError(f"no kernel is called {kernel!r}")


def _signature(kernel: Any, spec: Spec) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]]]:
    """Argument types by our naming rules, and which arguments are multiples of 16."""
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        signature[name] = _argument_type(name, spec.dtype)
        # ranks that are no multiple of 16 run 16 at a time: see the plan
        wide = (
            spec.aligned and name not in ("scale", "drop_threshold") and (name != "R" or spec.tile.rank > 16)
        )
        if name.endswith("_ptr") or wide:
            aligned[(index,)] = [["tt.divisibility", 16]]
    return signature, aligned


def _argument_type(name: str, dtype: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "scale" else "i32"
    # adapters stay in fp32 beside a 16-bit layer by default, the case that needs more registers
    special = {"mask_ptr": "i32", "seed_ptr": "i64", "lora_a_ptr": "fp32", "lora_b_ptr": "fp32"}
    return "*" + ("fp32" if name.endswith("_partial_ptr") else special.get(name, dtype))


def _constants(spec: Spec) -> dict[str, Any]:
    from fastlora_kernels.primitives import TILES_PER_GROUP

    tile, group = spec.tile, {"GROUP": TILES_PER_GROUP}
    forward = {"BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_K": tile.depth, "HAS_BIAS": True}
    constants: dict[str, dict[str, Any]] = {
        "lora_down": {"BLOCK_M": tile.rows, "BLOCK_K": tile.depth},
        "lora_forward": forward | group,
        "lora_grad_s_b": {"BLOCK_M": tile.rows, "BLOCK_N": tile.cols},
        "lora_grad_x": {"BLOCK_M": tile.rows, "BLOCK_K": tile.cols, "BLOCK_N": tile.depth} | group,
        "lora_grad_a": {"BLOCK_M": tile.rows, "BLOCK_K": tile.cols},
    }
    dropout = {"HAS_DROPOUT": spec.dropout} if spec.kernel in _WITH_DROPOUT else {}
    return constants[spec.kernel] | {"BLOCK_R": tile.rank} | dropout


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


def main() -> None:
    """Read specs as JSON from standard input, print one row as JSON for each."""
    for fields in json.load(sys.stdin):
        spec = Spec(**{**fields, "tile": Tile(**fields["tile"])})
        print(json.dumps(asdict(compile_spec(spec))), flush=True)


if __name__ == "__main__":
    main()
