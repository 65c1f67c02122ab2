"""What a module's forward calls with which variable, read in its source."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn


class Call(NamedTuple):
    """``self.module(argument)``; the argument is None if it is no variable, or not the only one."""

    module: str
    argument: str | None


# None: what stands above may not have run
Event = Call | str | None
# line, column, and who comes first of those that end there
_Position = tuple[int, int, int]
_CALL, _NAME, _LEFT = range(3)
_Placed = ast.expr | ast.stmt | ast.ExceptHandler | ast.pattern


def sharing(
    module: nn.Module, kind: type, free: Callable[[nn.Module], bool] = lambda layer: True
) -> list[list[str]]:
    """Names of a module's layers that its forward calls with one variable, two at least in each list.

    Args:
        module: The module; one whose forward was replaced has none.
        kind: Class of the layers, which have ``in_features``.
        free: Whether a layer may be among them.
    """
    if "forward" in vars(module):
        return []
    children = dict(module.named_children())
    with_layers = {
        name for name, each in children.items() if any(isinstance(m, kind) for m in each.modules())
    }
    runs, current = list[list[str]](), dict[str, list[str]]()
    for event in events_of(type(module).forward) if len(with_layers) > 1 else ():
        if event is None:
            # what was called in another one is not called in this
            current.clear()
        elif not isinstance(event, Call):
            # the variable is another value from here on
            current.pop(event, None)
        elif event.module in with_layers:
            name, layer = event.module, children[event.module]
            run = current.get(event.argument or "")
            if not isinstance(layer, kind) or not free(layer) or event.argument is None:
                current.clear()
            elif run is None or name in run or layer.in_features != children[run[0]].in_features:
                # what is called between two siblings' calls would drop what was computed ahead
                current = {event.argument: [name]}
                runs.append(current[event.argument])
            else:
                current = {event.argument: run}
                run.append(name)
    found = list[list[str]]()
    for run in runs:
        if len(run) > 1 and not any(name in other for other in found for name in run):
            found.append(run)
    return found


@functools.cache
def events_of(forward: Callable[..., Any]) -> tuple[Event, ...]:
    """Calls of ``self``'s attributes in the order in which they run, and names of variables where they are
    assigned; None where another branch begins, or this one is left.

    Args:
        forward: A method; one whose source is not found has none.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return ()
    events = [event for node in ast.walk(tree) for event in (*_of_node(node), *_of_branches(node))]
    return tuple(event for _, event in sorted(events, key=lambda each: each[0]))


def _of_node(node: ast.AST) -> Iterator[tuple[_Position, Event]]:
    """A call, or assigned names: each after what stands to the right, or within, is computed."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
            yield _end(node, _CALL), Call(name, _argument(node))
        case ast.For(target=target, iter=last) | ast.AsyncFor(target=target, iter=last):
            yield from ((_end(last, _NAME), name.id) for name in _assigned(target))
        case ast.withitem(context_expr=last, optional_vars=target):
            yield from ((_end(last, _NAME), name.id) for name in _assigned(target))
        case ast.stmt() | ast.NamedExpr() if not hasattr(node, "body"):
            yield from ((_end(node, _NAME), name.id) for name in _assigned(node))


def _of_branches(node: ast.AST) -> Iterator[tuple[_Position, Event]]:
    """Where a branch begins that excludes another, or what follows is another one."""
    match node:
        case ast.Return() | ast.Continue() | ast.Break():
            yield _end(node, _LEFT), None
        case ast.ExceptHandler() | ast.pattern():
            yield _start(node), None
    others = getattr(node, "orelse", None) or []
    others = others if isinstance(others, list) else [others]
    # one without calls changes nothing
    if any(
        isinstance(event, Call) for other in others for each in ast.walk(other) for _, event in _of_node(each)
    ):
        yield _start(others[0]), None


def _start(node: _Placed) -> _Position:
    return node.lineno, node.col_offset, _CALL


def _end(node: _Placed, who: int) -> _Position:
    return node.end_lineno or node.lineno, node.end_col_offset or node.col_offset, who


def _assigned(node: ast.AST | None) -> list[ast.Name]:
    names = [each for each in ast.walk(node or ast.Pass()) if isinstance(each, ast.Name)]
    return [name for name in names if not isinstance(name.ctx, ast.Load)]


def _argument(call: ast.Call) -> str | None:
    only = call.args[0] if len(call.args) == 1 and not call.keywords else None
    return only.id if isinstance(only, ast.Name) else None
