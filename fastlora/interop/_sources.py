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
    events: list[tuple[tuple[int, int], Event]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            # assigned after what stands to the right is computed
            end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
            events += [(end, name.id) for name in _assigned(node)]
        elif isinstance(node, ast.For | ast.With | ast.AsyncFor | ast.AsyncWith):
            events += [((name.lineno, name.col_offset), name.id) for name in _assigned(node)]
        elif isinstance(node, ast.Call):
            match node.func:
                case ast.Attribute(value=ast.Name(id="self"), attr=name):
                    events.append(((node.lineno, node.col_offset), Call(name, _argument(node))))
    return tuple(event for _, event in sorted(events, key=lambda each: each[0]))


def _assigned(node: ast.AST) -> list[ast.Name]:
    names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    return [name for name in names if not isinstance(name.ctx, ast.Load)]


def _argument(call: ast.Call) -> str | None:
    only = call.args[0] if len(call.args) == 1 and not call.keywords else None
    return only.id if isinstance(only, ast.Name) else None
