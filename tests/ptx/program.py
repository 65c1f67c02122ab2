"""A decoded kernel, and how it is put together: registers, constants, instructions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.ptx.engine import Engine
from tests.ptx.source import Register, Statement, Unsupported

# what counters tell apart
CLASSES = (
    "product", "matrix", "shared", "global", "copy", "barrier", "shuffle", "integer", "float", "convert",
    "move", "predicate", "branch", "other",
)  # fmt: skip
_SPECIAL = re.compile(r"%(tid|ctaid|nctaid|ntid)\.[xyz]")
_REGISTER = re.compile(r"%([a-z]+)\d+")
_WIDE = ("rd", "fd")
_ALL_LANES = 0xFFFFFFFF

# a constant's value: a number, the start of shared memory, a tensor map or what ld.param reads
Constant = int | tuple[str, ...]


@dataclass
class Program:
    """A kernel, decoded.

    Attributes:
        name: Of the kernel.
        parameters: Name and bytes of each.
        instructions: One tuple each, as ``engine.Instruction``.
        operands: Units of registers, which instructions point into.
        statements: What each instruction was.
        classes: What each counts as, out of :data:`CLASSES`.
        constants: The unit of each, by value and bits.
        special: The unit of ``%tid.x`` and the like.
        units: How many units of 32 words all registers take.
        loops: First and last instruction of each.
    """

    name: str
    parameters: list[tuple[str, int]]
    instructions: list[tuple[int, ...]] = field(default_factory=list)
    operands: list[int] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    constants: dict[tuple[Constant, int], int] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    units: int = 0
    loops: list[tuple[int, int]] = field(default_factory=list)


class Assembler:
    """Adds one statement after the other to a program.

    Args:
        program: The program.
        engine: What will run it.

    Attributes:
        now: The statement that is being added.
    """

    now: Statement

    def __init__(self, program: Program, engine: Engine) -> None:
        self.program, self.engine = program, engine
        self._units, self._scoped = dict[tuple[str, int], int](), set[tuple[str, int]]()
        self._wide = set[int]()

    def declare(self, register: Register) -> None:
        """A register of braces."""
        key = (register.name, register.scope)
        self._scoped.add(key)
        self._units[key] = self._new_unit(wide=register.type.endswith("64"))

    def register(self, name: str) -> int:
        """The unit of a register; of ``_``, one that nobody reads."""
        if name == "_":
            return self._new_unit(wide=False)
        key = (name, self.now.scope if (name, self.now.scope) in self._scoped else 0)
        if key not in self._units:
            kind = _REGISTER.fullmatch(name)
            if kind is None:
                raise Unsupported(f"operand {name!r}")
            self._units[key] = self._new_unit(wide=kind[1] in _WIDE)
        return self._units[key]

    def is_wide(self, unit: int) -> bool:
        """Whether a register has 64 bits."""
        return unit in self._wide

    def value(self, text: str, bits: int) -> int:
        """The unit of an operand that is read: a register, a constant or an address of the kernel's."""
        if _SPECIAL.fullmatch(text):
            if text not in self.program.special:
                self.program.special[text] = self._new_unit(wide=False)
            return self.program.special[text]
        if text.startswith("%") or (text, self.now.scope) in self._scoped:
            return self.register(text)
        if text == "global_smem":
            return self.constant(("shared",), 32)
        if any(text == name for name, _ in self.program.parameters):
            return self.constant(("map", text), 64)
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return self.constant(int(match[1], 16), 32)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0)
            return self.constant(value & ((1 << bits) - 1), 64 if bits == 64 else 32)
        raise Unsupported(f"operand {text!r}")

    def values(self, texts: Sequence[str], bits: int) -> list[int]:
        """The units of several."""
        return [self.value(text, bits) for text in texts]

    def predicate(self, text: str) -> int:
        """The unit of a predicate that is read."""
        if text.startswith("%"):
            return self.register(text)
        return self.constant(_ALL_LANES if int(text) else 0, 32)

    def constant(self, value: Constant, bits: int) -> int:
        """The unit that holds a constant."""
        key = (value, bits)
        if key not in self.program.constants:
            self.program.constants[key] = self._new_unit(wide=bits == 64)
        return self.program.constants[key]

    def emit(
        self, operation: str, kind: str, results: Sequence[int], sources: Sequence[int], **fields: int
    ) -> None:
        """Add an instruction.

        Args:
            operation: Its name in ``executor.h``.
            kind: What it counts as.
            results: Units that it writes.
            sources: Units that it reads.
            fields: ``a``, ``b``, ``c``, ``offset`` and ``source_offset``, as the operation wants them.
        """
        assert kind in CLASSES, kind
        program = self.program
        predicate = self.register(self.now.predicate) if self.now.predicate else -1
        given = [fields.pop(name, 0) for name in ("a", "b", "c", "unused", "offset", "source_offset")]
        assert not fields, fields
        counts = (len(results), len(sources), len(program.operands))
        code = self.engine.operations[operation]
        program.instructions.append((code, predicate, int(self.now.negated), *counts, *given))
        program.operands += [*results, *sources]
        program.statements.append(self.now)
        program.classes.append(kind)

    # ---- what an opcode ends with ----
    @property
    def bits(self) -> int:
        """Bits of its type."""
        digits = re.search(r"\d+$", self.now.opcode[-1])
        assert digits is not None, self.now.text
        return int(digits[0])

    @property
    def type(self) -> int:
        """The executor's number of its type."""
        return self.type_of(self.now.opcode[-1])

    def type_of(self, name: str) -> int:
        """The executor's number of a type: bits without one count as unsigned."""
        return self.engine.types[re.sub(r"^B(?=\d)", "U", name.upper())]

    def _new_unit(self, *, wide: bool) -> int:
        unit = self.program.units
        self.program.units += 2 if wide else 1
        if wide:
            self._wide.add(unit)
        return unit
