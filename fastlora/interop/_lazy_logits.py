"""Logits that a head computes when somebody reads them, and the loss takes without ever having them whole."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Rows = Callable[[Tensor], Tensor]

# what models do to logits, element by element, before the loss
_ELEMENTWISE = {
    torch.tanh,
    torch.mul,
    torch.div,
    Tensor.tanh,
    Tensor.float,
    Tensor.to,
    Tensor.contiguous,
    Tensor.mul,
    Tensor.__mul__,
    Tensor.__rmul__,
    Tensor.div,
    Tensor.__truediv__,
}
# answered without the values; who asks for these is often only looking for what takes part in backward
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
}


class LazyLogits(Tensor):
    """head(hidden) of ``[..., hidden_size]``, not computed until it is read.

    A tensor of the logits' shape, dtype and device. Anything but its layout is asked of the logits, which are
    computed then, once; multiplying or dividing by a number, tanh and another dtype only add a step.

    Args:
        hidden: ``[..., hidden_size]``.
        compute: Makes logits of any of hidden's rows.
        none: The logits of no rows, in the dtype and on the device of all.
    """

    hidden: Tensor
    compute: Rows
    none: Tensor

    def __new__(cls, hidden: Tensor, compute: Rows, none: Tensor) -> "LazyLogits":
        """See the class."""
        shape = (*hidden.shape[:-1], none.shape[-1])
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=none.dtype, device=none.device, requires_grad=False
        )
        return made  # type: ignore[no-any-return]

    def __init__(self, hidden: Tensor, compute: Rows, none: Tensor) -> None:
        """See the class."""
        self.hidden, self.compute, self.none = hidden, compute, none
        self._read: dict[bool, Tensor] = {}

    def read(self) -> Tensor:
        """The logits; with their graph where gradients are recorded."""
        recorded = torch.is_grad_enabled()
        if recorded not in self._read:
            self._read[recorded] = self.compute(self.hidden)
        return self._read[recorded]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A step more, a fact, or the function on the logits."""
        kwargs = kwargs or {}
        if func in _KNOWN:
            known: Any = super().__torch_function__
            return known(func, types, args, kwargs)
        others = (*args[1:], *kwargs.values())
        if func in _ELEMENTWISE and type(args[0]) is cls and not any(isinstance(o, Tensor) for o in others):
            logits: LazyLogits = args[0]
            return cls(
                logits.hidden,
                lambda rows: func(logits.compute(rows), *args[1:], **kwargs),
                func(logits.none, *args[1:], **kwargs),
            )
        return func(*tree_map_only(cls, cls.read, args), **tree_map_only(cls, cls.read, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, where torch's own code reads a tensor."""
        args, kwargs = tree_map_only(cls, lambda logits: logits.read().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def made_lazily(head: nn.Module) -> Iterator[None]:
    """A context in which a head's forward returns :class:`LazyLogits`."""
    own = vars(head).get("forward")
    head.forward = functools.partial(_lazily, head.forward)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _lazily(forward: Rows, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or type(hidden) is not Tensor:
        return forward(hidden, *args, **kwargs)
    # in the caller's grad mode: autocast keeps the weights that it casts here
    none = forward(hidden[..., :0, :]).detach()
    return LazyLogits(hidden, forward, none)
