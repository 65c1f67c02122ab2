"""PTX text as Triton's compiler writes it: statements, labels and the lines of Python that they come from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# a line of the source, a label, a statement (over several lines, if need be), a brace, or what is none
_TOKEN = re.compile(
    r"^\.loc\s+(\d+)\s+(\d+)[^\n]*$|^(\$?\w+):(?=\s|$)|((?:\.reg|\.pragma|[@a-z])[^;]*;)|^([{}])$|(\S)", re.M
)
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class Unsupported(ValueError):
    """What the executor doesn't know; nothing is ever skipped or guessed."""


@dataclass(frozen=True)
class Statement:
    """An instruction.

    Attributes:
        opcode: Its parts: ``("add", "s32")``.
        arguments: As written.
        predicate: The register that decides which lanes take part; empty where all do.
        negated: Whether those do for which it is false.
        scope: Number of the braces that it stands in, whose registers and labels are their own; 0 outside.
        line: ``file:line`` of the kernel's source.
        text: As written.
    """

    opcode: tuple[str, ...]
    arguments: list[str]
    predicate: str
    negated: bool
    scope: int
    line: str
    text: str


@dataclass(frozen=True)
class Label:
    """A place to branch to."""

    name: str
    scope: int


@dataclass(frozen=True)
class Register:
    """A register that braces declare, with its type."""

    name: str
    type: str
    scope: int


class Module:
    """The one kernel of a module.

    Args:
        text: The module.

    Attributes:
        name: Of the kernel.
        parameters: Name and bytes of each.
    """

    def __init__(self, text: str) -> None:
        head = re.search(r"\.entry\s+(\w+)\((.*?)\)(.*?)\n\{", text, re.S)
        if head is None:
            raise Unsupported("expected a module with an .entry, got none")
        self.name = head[1]
        found = re.findall(r"\.param\s+(.*?)(\w+)(\[\d+\])?\s*(?:,|$)", head[2].strip(), re.M)
        self.parameters = [(name, _size(kind, array)) for kind, name, array in found]
        self._files: dict[str, str] = dict(re.findall(r'\.file\s+(\d+) "([^"]*)"', text))
        body = re.sub(r"//[^\n]*", "", text[head.end() : text.index("$L__func_end0:")])
        self._body = "\n".join(line.strip() for line in body.split("\n"))

    def __iter__(self) -> Iterator[Statement | Label | Register]:
        """Everything in order."""
        line, scope, scopes = "?", 0, 0
        for token in _TOKEN.finditer(self._body):
            file, number, label, statement, brace, unknown = token.groups()
            if file:
                line = f"{self._files[file].rpartition('/')[2]}:{number}"
            elif label:
                yield Label(label, scope)
            elif brace == "{":
                scope = scopes = scopes + 1
            elif brace:
                scope = 0
            elif unknown:
                raise Unsupported(repr(self._body[token.start() - 40 : token.start() + 40]))
            elif statement.startswith("."):
                declared = re.fullmatch(r"\.reg\s+\.(\w+)\s+(\w+)\s*;", statement)
                if scope and declared:
                    yield Register(declared[2], declared[1], scope)
            else:
                yield _statement(statement.rstrip(";").strip(), scope, line)


def _statement(text: str, scope: int, line: str) -> Statement:
    match = _STATEMENT.fullmatch(text)
    if match is None:
        raise Unsupported(text)
    negated, predicate, opcode, rest = match.groups()
    parts = tuple(part for part in opcode.split(".") if part)
    return Statement(parts, split(rest), predicate or "", bool(negated), scope, line, " ".join(text.split()))


def split(text: str) -> list[str]:
    """Operands of a list; commas inside braces and brackets stay."""
    out, depth, start = list[str](), 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            out.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*out, last] if last else out


def _size(kind: str, array: str) -> int:
    match = re.search(r"\.[bufs](\d+)", kind)
    assert match is not None, kind
    return int(array[1:-1]) if array else _BYTES[match[1]]
