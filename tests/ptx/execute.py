"""Runs one launch of a decoded kernel and says what it did."""

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx import engine as c_engine
from tests.ptx.engine import COUNTS, Engine, TensorMap
from tests.ptx.program import Constant, Program

# Triton stores one value from several warps where each has all of a small tile; it harms nobody
HARMLESS = ("same value written by several warps",)
# of all CTAs together: far beyond any test's
MOST_INSTRUCTIONS = 2_000_000_000


@dataclass(frozen=True)
class Memory:
    """What a kernel may touch: one block, or rows at a distance.

    Attributes:
        name: Of the argument.
        start: Address.
        bytes: From the first to the last.
        row_bytes: Of each row.
        stride: Bytes from one row to the next; 0 for a block.
    """

    name: str
    start: int
    bytes: int
    row_bytes: int = 0
    stride: int = 0


@dataclass(frozen=True)
class Launch:
    """A grid of programs and what they are given.

    Attributes:
        grid: Programs along each axis.
        warps: Of each.
        shared_bytes: Shared memory of each.
        parameters: The bytes of each.
        memory: All that they may touch.
        maps: What each 128-byte parameter describes.
    """

    grid: tuple[int, int, int]
    warps: int
    shared_bytes: int
    parameters: Sequence[bytes]
    memory: Sequence[Memory]
    maps: Sequence[TensorMap] = ()


@dataclass(frozen=True)
class Outcome:
    """What a launch did.

    Attributes:
        program: What ran.
        launch: How.
        findings: In words: the first of its kind at each instruction.
        harmless: How often each thing happened that looks odd and isn't wrong.
        counts: A row for each instruction, columns as ``engine.COUNTS``.
    """

    program: Program
    launch: Launch
    findings: list[str]
    harmless: dict[str, int]
    counts: np.ndarray


def execute(program: Program, launch: Launch, engine: Engine) -> Outcome:
    """Run every program of the grid, one after the other.

    Args:
        program: The decoded kernel.
        launch: How it is launched.
        engine: What runs it.
    """
    assert launch.warps <= c_engine.MOST_WARPS
    registers, defined = _registers(program, launch)
    instructions = np.array(program.instructions, _dtype(c_engine.Instruction))
    operands = np.array([*program.operands, 0], np.int32)
    counts = np.zeros((len(program.instructions), len(COUNTS)), np.uint64)
    # one of each at least, so that they have an address
    buffers = (c_engine.Buffer * (len(launch.memory) + 1))()
    touched = [np.zeros((2, max(memory.bytes, 1)), np.uint32) for memory in launch.memory]
    for buffer, memory, (writer, reader) in zip(buffers, launch.memory, touched, strict=False):
        for name in ("start", "bytes", "row_bytes", "stride"):
            setattr(buffer, name, getattr(memory, name))
        buffer.writer, buffer.reader = writer.ctypes.data, reader.ctypes.data
    findings = (c_engine.Finding * c_engine.MOST_FINDINGS)()
    maps = (TensorMap * (len(launch.maps) + 1))(*launch.maps)
    arguments = engine.launch_type(
        instructions=instructions.ctypes.data, operands=operands.ctypes.data,
        registers=registers.ctypes.data, defined=defined.ctypes.data, counts=counts.ctypes.data,
        buffers=c.addressof(buffers), maps=c.addressof(maps), findings=c.addressof(findings),
        limit=MOST_INSTRUCTIONS, units=program.units, warps=launch.warps,
        shared_bytes=max(launch.shared_bytes, 16), shared_start=c_engine.SHARED_START,
        buffer_count=len(launch.memory), map_count=len(launch.maps),
        thread_unit=program.special.get("%tid.x", -1),
        cta_unit=tuple(program.special.get(f"%ctaid.{axis}", -1) for axis in "xyz"), grid=launch.grid,
    )  # fmt: skip
    engine.run(c.byref(arguments))
    kinds = dict(zip(engine.findings, arguments.kinds, strict=True))
    said = [(engine.findings[each.kind], each) for each in findings[: arguments.finding_count]]
    words = [_words(kind, each, program, launch) for kind, each in said if kind not in HARMLESS]
    harmless = {kind: kinds[kind] for kind in HARMLESS if kinds[kind]}
    return Outcome(program, launch, words, harmless, counts.astype(np.int64))


def _dtype(structure: type[c.Structure]) -> np.dtype:
    dtype = np.dtype([(name, np.dtype(kind)) for name, kind, *_ in structure._fields_])
    assert dtype.itemsize == c.sizeof(structure)
    return dtype


def _registers(program: Program, launch: Launch) -> tuple[np.ndarray, np.ndarray]:
    """What a warp starts with, and which of it is defined."""
    registers = np.zeros((program.units, 32), np.uint32)
    defined = np.zeros(program.units, np.uint8)
    values = {
        unit: (_value(value, program, launch), bits) for (value, bits), unit in program.constants.items()
    }
    sizes = {"ntid": (32 * launch.warps, 1, 1), "nctaid": launch.grid, "tid": (0, 0, 0), "ctaid": (0, 0, 0)}
    for name, unit in program.special.items():
        kind, _, axis = name.removeprefix("%").partition(".")
        values[unit] = (sizes[kind]["xyz".index(axis)], 32)
    for unit, (number, bits) in values.items():
        if bits == 64:
            registers[unit : unit + 2].reshape(-1).view(np.uint64)[:] = number
        else:
            registers[unit] = number & 0xFFFFFFFF
        defined[unit : unit + bits // 32] = 1
    return registers, defined


def _value(constant: Constant, program: Program, launch: Launch) -> int:
    match constant:
        case int():
            return constant
        case ("shared",):
            return c_engine.SHARED_START
        case ("map", name):
            maps = [each for each, size in program.parameters if size == c_engine.MAP_BYTES]
            return c_engine.MAPS + c_engine.MAP_BYTES * maps.index(name)
        case ("parameter", name, offset, kind):
            names = [each for each, _ in program.parameters]
            start, size = int(offset), int(kind[1:]) // 8
            raw = launch.parameters[names.index(name)][start : start + size]
            return int.from_bytes(raw, "little", signed=kind[0] == "s") & (2**64 - 1)
    raise AssertionError(constant)


def _words(kind: str, found: c_engine.Finding, program: Program, launch: Launch) -> str:
    statement = program.statements[found.instruction]
    text = f"{kind}: `{statement.text[:100]}` of {statement.line}, program {found.cta}, warp {found.warp}"
    if kind.startswith("global"):
        text += f", {found.size} bytes {_nearest(found.address, launch.memory)}"
    elif found.size:
        text += f", {found.size} bytes at {found.address:#x}"
    if found.other >= 0:
        text += f"; the other is {found.other}"
    if found.other_instruction >= 0:
        other = program.statements[found.other_instruction]
        text += f" at `{other.text[:100]}` of {other.line}"
    return text


def _nearest(address: int, memory: Sequence[Memory]) -> str:
    """Where an address lies, seen from the tensor that is nearest."""

    def distance(each: Memory) -> int:
        return max(each.start - address, address - (each.start + each.bytes), 0)

    nearest = min(memory, key=distance, default=None)
    if nearest is None:
        return f"at {address:#x}"
    rows = f", rows of {nearest.row_bytes} every {nearest.stride}" if nearest.stride else ""
    return f"at {address - nearest.start} of {nearest.name}, which has {nearest.bytes}{rows}"
