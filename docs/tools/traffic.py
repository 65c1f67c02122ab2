"""What kernels read and write, read off their source."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels" / "fastlora_kernels"
_STORES = {"store_tile", "store"}
_SHAPE = re.compile(r"^\s*(\w+)_ptr,  # \(([^)]*)\)", re.MULTILINE)


@dataclass(frozen=True)
class Tensor:
    """A tensor that a kernel takes.

    Attributes:
        name: As the kernel's argument has it, without ``_ptr``.
        shape: As the comment beside the argument says it.
        written: Whether the kernel stores to it.
    """

    name: str
    shape: str
    written: bool


def tensors(folder: str, kernel: str) -> list[Tensor]:
    """Every tensor that a kernel takes, in its order.

    Args:
        folder: ``"lora"``, ``"adapter"`` or ``"quant"``.
        kernel: The launcher's name.
    """
    functions, source = _functions(folder), _source(folder)
    function = functions[f"_{kernel}_kernel"]
    shapes = dict(_SHAPE.findall(source.split(f"def {function.name}(", 1)[1].split("):\n", 1)[0]))
    written = _written(function, functions)
    if not written:
        raise ValueError(f"expected a kernel that stores something, found none in {function.name}")
    return [Tensor(name, shape, f"{name}_ptr" in written) for name, shape in shapes.items()]


def formula(folder: str, kernel: str) -> str:
    """The first clause of a kernel's docstring."""
    text = ast.get_docstring(_functions(folder)[f"_{kernel}_kernel"]) or ""
    return re.split(
        r", accumulated|, in fp32|, from one read| over the split| from one read|\. |\.\n|\.$", text
    )[0]


@cache
def _source(folder: str) -> str:
    return "\n".join(path.read_text() for path in sorted((KERNELS / folder).glob("*.py")))


@cache
def _functions(folder: str) -> dict[str, ast.FunctionDef]:
    return {
        node.name: node for node in ast.walk(ast.parse(_source(folder))) if isinstance(node, ast.FunctionDef)
    }


def _written(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> set[str]:
    """Arguments of a function that it stores to, itself or through what it calls."""
    stored = {name for call in _calls(function) for name in _stored_by(call, functions)}
    # s_ptr = s_partial_ptr + …: whoever stores to the one stores to the other
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in stored:
            stored |= {_first_name(node.value)}
    return stored & {argument.arg for argument in function.args.args}


def _stored_by(call: ast.Call, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in _STORES:
        yield _first_name(call.args[0])
    elif name in functions:
        called = functions[name]
        below = _written(called, functions)
        given = dict(zip((argument.arg for argument in called.args.args), call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        yield from (_first_name(given[argument]) for argument in below)


def _calls(function: ast.FunctionDef) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))


def _first_name(value: ast.expr) -> str:
    while isinstance(value, ast.BinOp):
        value = value.left
    return value.id if isinstance(value, ast.Name) else ""
