"""What a module's forward calls with which variable, read in its source."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple


class Call(NamedTuple):
    """``self.module(argument)``; the argument is None if it is no variable, or not the only one."""

    module: str
    argument: str | None


Event = Call | str
# line and column
_Position = tuple[int, int]


@functools.cache
def events_of(forward: Callable[..., Any]) -> tuple[Event, ...]:
    """Calls of ``self``'s attributes in the text's order, and names of variables where they are assigned.

    Args:
        forward: A method; one whose source is not found has none.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return ()
    events: list[tuple[_Position, Event]] = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                events.append((_start(node), Call(name, _argument(node))))
            case ast.For(target=target) | ast.AsyncFor(target=target) | ast.withitem(optional_vars=target):
                events += [(_start(name), name.id) for name in _assigned(target)]
            case ast.stmt() | ast.NamedExpr() if not hasattr(node, "body"):
                # assigned after what stands to the right is computed
                events += [(_end(node), name.id) for name in _assigned(node)]
    return tuple(event for _, event in sorted(events, key=lambda each: each[0]))


def _start(node: ast.expr) -> _Position:
    return node.lineno, node.col_offset


def _end(node: ast.stmt | ast.expr) -> _Position:
    return node.end_lineno or node.lineno, node.end_col_offset or node.col_offset


def _assigned(node: ast.AST | None) -> list[ast.Name]:
    names = [each for each in ast.walk(node or ast.Pass()) if isinstance(each, ast.Name)]
    return [name for name in names if not isinstance(name.ctx, ast.Load)]


def _argument(call: ast.Call) -> str | None:
    only = call.args[0] if len(call.args) == 1 and not call.keywords else None
    return only.id if isinstance(only, ast.Name) else None
