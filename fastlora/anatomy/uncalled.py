"""Layers whose weight a model reads without calling the layer: what is put there would never run.

torchvision's Swin, for instance, passes ``self.qkv.weight`` to a functional; so do timm's BEiT, EVA and Swin
V2, depending on their settings, and Hugging Face's WavLM and Mamba. LoRA at ``qkv`` would train nothing
there, and change the output once merged. What a module does is read off its class's source code.
"""

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Collection, Mapping
from types import FunctionType
from typing import Any

from torch import nn

# methods in which a weight is read beside the forward pass
_BESIDE = ("__", "init", "_init", "reset", "_reset", "load", "_load", "save", "_save", "tie", "_tie")
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_UNKNOWN = object()


def bypassed(names: Mapping[str, nn.Module], chosen: Collection[nn.Module]) -> dict[str, str]:
    """Which of these layers the module around them reads and does not use otherwise, and that module's class.

    A layer that is called on some path, or whose module has no source code, is not among them.
    """
    found: dict[str, str] = {}
    called: set[int] = set()
    methods: dict[type, list[ast.FunctionDef]] = {}
    wanted = set(map(id, chosen))
    for name, layer in names.items():
        if not name or id(layer) not in wanted:
            continue
        outer, _, attribute = name.rpartition(".")
        parent = names[outer]
        kind = type(parent)
        if kind not in methods:
            # an nn.MultiheadAttention is adapted as a whole
            methods[kind] = [] if issubclass(kind, nn.MultiheadAttention) else _reading_methods(kind)
        if attribute in _only_read(parent, methods[kind]):
            found[name] = kind.__name__
        else:
            called.add(id(layer))
    return {name: kind for name, kind in found.items() if id(names[name]) not in called}


def _only_read(module: nn.Module, methods: list[ast.FunctionDef]) -> set[str]:
    uses = [_Uses(module, method) for method in methods]
    read, used = (set[str]().union(*sets) for sets in ((u.read for u in uses), (u.used for u in uses)))
    return read - used


def _reading_methods(kind: type[nn.Module]) -> list[ast.FunctionDef]:
    """A class's methods if any of them reads a weight, whatever the settings; most classes read none."""
    functions: dict[str, FunctionType] = {}
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and not name.startswith("__"):
                functions.setdefault(name, inspect.unwrap(value))
    # known without reading source code, which takes longer
    if not any("weight" in function.__code__.co_names for function in functions.values()):
        return []
    methods = []
    for function in functions.values():
        try:
            node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, TypeError, SyntaxError):
            return []
        if isinstance(node, ast.FunctionDef):
            methods.append(node)
    return methods


class _Uses(ast.NodeVisitor):
    """What one method does with the attributes of ``self``.

    Attributes:
        read: Attributes whose ``weight`` goes into a computation.
        used: Attributes that are called, or handed on whole.
    """

    def __init__(self, module: nn.Module, method: ast.FunctionDef) -> None:
        """Settings of ``module`` decide which branches count."""
        self.read: set[str] = set()
        self.used: set[str] = set()
        self._module = module
        self._beside = method.name.startswith(_BESIDE)
        self.generic_visit(method)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        """Follow the branch that this module takes, if its settings tell."""
        test = _value(node.test, self._module)
        if test is not _UNKNOWN:
            taken = node.body if test else node.orelse
            for part in taken if isinstance(taken, list) else [taken]:
                self.visit(part)
        else:
            self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """``self.layer.weight`` is read, ``self.layer`` used, ``self.layer.weight.dtype`` neither."""
        if _own(node) is not None:
            if isinstance(node.ctx, ast.Load):
                self.used.add(node.attr)
            return
        inner = node.value
        if isinstance(inner, ast.Attribute) and inner.attr in ("weight", "bias") and _own(inner.value):
            if node.attr not in ("dtype", "device", "shape", "requires_grad"):
                self._reads(inner)
        elif node.attr in ("weight", "bias") and _own(inner):
            self._reads(node)
        else:
            self.generic_visit(node)

    def _reads(self, node: ast.Attribute) -> None:
        layer = _own(node.value)
        if layer and node.attr == "weight" and isinstance(node.ctx, ast.Load) and not self._beside:
            self.read.add(layer)


def _own(node: ast.AST) -> str | None:
    """``layer`` for ``self.layer``."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else None


def _value(node: ast.expr, module: nn.Module) -> object:
    """What a test comes to that asks for nothing but a module's settings."""
    if isinstance(node, ast.Constant):
        return node.value
    name = _own(node)
    if name is not None and name != "training":
        value = getattr(module, name, _UNKNOWN)
        return value if value is None or isinstance(value, bool | int | nn.Module) else _UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _value(node.operand, module)
        return _UNKNOWN if value is _UNKNOWN else not value
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _compared(node, module)
    return _UNKNOWN


def _compared(node: ast.Compare, module: nn.Module) -> object:
    compare = _COMPARISONS.get(type(node.ops[0]))
    left, right = _value(node.left, module), _value(node.comparators[0], module)
    name = _own(node.left)
    if right is None and name is not None and hasattr(module, name):
        # a tensor is no setting, but it is there or not
        left = getattr(module, name)
    if compare is None or left is _UNKNOWN or right is _UNKNOWN:
        return _UNKNOWN
    try:
        return compare(left, right)
    except TypeError:
        return _UNKNOWN
