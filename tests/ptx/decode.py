"""PTX text as a program of the executor."""

from tests.ptx.arithmetic import ARITHMETIC
from tests.ptx.engine import Engine
from tests.ptx.memory import MEMORY
from tests.ptx.program import Assembler, Program
from tests.ptx.source import Label, Module, Register, Statement, Unsupported

_HANDLERS = {**ARITHMETIC, **MEMORY}


def decode(text: str, engine: Engine) -> Program:
    """The kernel of a module.

    Args:
        text: The module.
        engine: What will run it.

    Raises:
        Unsupported: A statement that the executor doesn't know.
    """
    module = Module(text)
    program = Program(module.name, module.parameters)
    assembler = Assembler(program, engine)
    labels, branches = dict[tuple[str, int], int](), dict[int, tuple[str, int]]()
    for each in module:
        if isinstance(each, Label):
            labels[_place(each.name, each.scope)] = len(program.instructions)
        elif isinstance(each, Register):
            assembler.declare(each)
        else:
            if each.opcode[0] == "bra":
                branches[len(program.instructions)] = _place(each.arguments[0], each.scope)
            _add(assembler, each)
    for index, label in branches.items():
        *before, _, source_offset = program.instructions[index]
        program.instructions[index] = (*before, labels[label], source_offset)
        if labels[label] <= index:
            program.loops.append((labels[label], index))
    return program


def _add(assembler: Assembler, statement: Statement) -> None:
    assembler.now = statement
    handler = _HANDLERS.get(statement.opcode[0])
    try:
        if handler is None:
            raise Unsupported("an unknown operation")
        handler(assembler)
    except (KeyError, IndexError, ValueError, AssertionError) as error:
        words = f"the executor doesn't know `{statement.text}` (of {statement.line}): {error}"
        raise Unsupported(words) from error


def _place(label: str, scope: int) -> tuple[str, int]:
    """Labels with a dollar belong to the kernel, others to their braces."""
    return label, 0 if label.startswith("$") else scope
