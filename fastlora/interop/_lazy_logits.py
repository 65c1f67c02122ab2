"""Logits that a head computes when somebody reads them, and the loss takes without ever having them whole."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastlora.ops.runtime import autocast_dtype, without_autocast

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


class Moment:
    """When a head was to compute its logits: nothing later may make them others.

    Args:
        hidden: What the head was given.
        head: It.
    """

    def __init__(self, hidden: Tensor, head: nn.Module) -> None:
        """See the class."""
        self._tensors = [hidden, *head.parameters()]
        self._versions = [_version(tensor) for tensor in self._tensors]
        self._recorded, self._autocast = torch.is_grad_enabled(), autocast_dtype(hidden)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """A context that computes as then.

        Raises:
            RuntimeError: A parameter of the head has changed since.
        """
        if [_version(tensor) for tensor in self._tensors] != self._versions:
            raise RuntimeError(
                'logits of a model with loss="chunked" are computed when they are read, and the head has '
                "changed since: read outputs.logits before the optimiser's step"
            )
        hidden, dtype = self._tensors[0], self._autocast
        as_then = without_autocast(hidden) if dtype is None else torch.autocast(hidden.device.type, dtype)
        with torch.set_grad_enabled(self._recorded), as_then:
            yield


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class LazyLogits(Tensor):
    """head(hidden) of ``[..., hidden_size]``, not computed until it is read.

    A tensor of the logits' shape, dtype and device. Anything but its layout is asked of the logits, which are
    computed then, once; multiplying or dividing by a number, tanh and another dtype only add a step.

    Args:
        hidden: ``[..., hidden_size]``.
        compute: Makes logits of any of hidden's rows.
        none: The logits of no rows, in the dtype and on the device of all.
        moment: As which they are computed.
    """

    hidden: Tensor
    compute: Rows

    def __new__(cls, hidden: Tensor, compute: Rows, none: Tensor, moment: Moment) -> "LazyLogits":
        """See the class."""
        shape = (*hidden.shape[:-1], none.shape[-1])
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=none.dtype, device=none.device, requires_grad=False
        )
        return made  # type: ignore[no-any-return]

    def __init__(self, hidden: Tensor, compute: Rows, none: Tensor, moment: Moment) -> None:
        """See the class."""
        self.hidden, self.compute, self._none, self._moment = hidden, compute, none, moment
        self._computed: Tensor | None = None

    @property
    def are_read(self) -> bool:
        """Whether there are logits, which may have been written to since."""
        return self._computed is not None

    def read(self) -> Tensor:
        """The logits; with their graph, if the model was called so."""
        if self._computed is None:
            with self._moment.again():
                self._computed = self.compute(self.hidden)
        return self._computed

    def then(self, func: Any, args: Any, kwargs: Any) -> "LazyLogits":
        """A function of each element on these."""
        compute = self.compute
        return LazyLogits(
            self.hidden,
            lambda rows: func(compute(rows), *args, **kwargs),
            func(self._none, *args, **kwargs),
            self._moment,
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A fact, a step more, or the function on the logits."""
        kwargs = kwargs or {}
        if func in _KNOWN:
            known: Any = super().__torch_function__
            return known(func, types, args, kwargs)
        first, *others = args or [None]
        numbers = not any(isinstance(other, Tensor) for other in (*others, *kwargs.values()))
        if func in _ELEMENTWISE and numbers and isinstance(first, cls) and not first.are_read:
            return first.then(func, others, kwargs)
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
    head.forward = functools.partial(_lazily, head, head.forward)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _lazily(head: nn.Module, forward: Rows, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or type(hidden) is not Tensor:
        return forward(hidden, *args, **kwargs)
    # in the caller's grad mode: autocast keeps the weights that it casts here
    none = forward(hidden[..., :0, :]).detach()
    return LazyLogits(hidden, forward, none, Moment(hidden, head))
