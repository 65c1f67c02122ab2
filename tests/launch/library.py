"""Watching library operations: which of them keep the host waiting. Large ones are skipped."""

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# elements; below this all are computed, so that Python code that reads numbers finds some
_HEAVY = 1 << 16
# the host waits for the GPU, which no CUDA graph can capture
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "lift_fresh"}
_FREE = re.compile(
    r"empty|new_empty|detach|alias|_unsafe_view|sym_|_reshape_alias|is_|size|stride|storage|set_"
)


class Library(TorchDispatchMode):
    """Notes waits, and skips what would take long on a CPU: results are then whatever memory holds.

    Attributes:
        waits: Operations for which the host would wait, and the line of fastlora that they came from.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits = list[str]()
        # this mode is no tracer: ops take the way that they take without it
        torch._C._len_torch_dispatch_stack = lambda: 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "fastlora":
            # our own implementation, whose operations come here in their turn
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if name in _WAITS:
            self.waits.append(f"{name} from {_caller()}")
        is_view = any(
            each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns
        )
        if is_view or _FREE.match(name):
            return func(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if sum(each.numel() for each in tensors) < _HEAVY:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return kwargs["out"] if "out" in kwargs else args[0]
        return _without_computing(func, args, kwargs)


def _without_computing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map(
        lambda each: each.to("meta") if isinstance(each, Tensor) else each, (args, kwargs)
    )
    result = func(*args, **(kwargs | {"device": "meta"} if "device" in kwargs else kwargs))
    return tree_map(
        lambda each: (
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype)
            if isinstance(each, Tensor)
            else each
        ),
        result,
    )


def _caller() -> str:
    """The innermost line of fastlora on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "/fastlora/" in frame.filename and "site-packages" not in frame.filename:
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "elsewhere"
