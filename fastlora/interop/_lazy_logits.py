"""Logits that a head computes when the model's forward reads them, and the loss takes without having them."""

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
# what trainers do to all outputs of a model, whether they are read or not
_HANDED_ON = {
    *(Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double),
    *(Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.contiguous, Tensor.clone, Tensor.detach),
}
# answered without the values; who asks for these is often only looking for what takes part in backward
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
}


class HeadCall:
    """A call of a head within a model's forward, during which its logits may be computed.

    Args:
        forward: The head's.
        hidden: ``[..., hidden_size]``, what it is called with.

    Attributes:
        hidden: What it is called with; None once the model's forward is over.
        taken: Whether a loss has taken the logits by rows.
    """

    def __init__(self, forward: Rows, hidden: Tensor) -> None:
        """See the class."""
        self.hidden: Tensor | None = hidden
        self.taken = False
        self._forward: Rows | None = forward
        self._autocast = autocast_dtype(hidden)

    def logits(self, rows: Tensor) -> Tensor:
        """Those of some rows, under the autocast of the call."""
        assert self._forward is not None
        dtype = self._autocast
        with without_autocast(rows) if dtype is None else torch.autocast(rows.device.type, dtype):
            return self._forward(rows)

    def end(self) -> None:
        """Let go of everything: what comes now would see another head, another mode or other weights."""
        self.hidden = self._forward = None


class LazyLogits(Tensor):
    """head(hidden) of ``[..., hidden_size]``, not computed until the model's forward reads it.

    A tensor of the logits' shape, dtype and device. Anything but its layout is asked of the logits, which are
    computed then, once; multiplying or dividing by a number, tanh and another dtype only add a step. When the
    model's forward is over, logits that were not computed are spent: they can be handed on, not read.

    Args:
        call: The head's.
        compute: Makes logits of any of hidden's rows.
        none: The logits of no rows, in the dtype and on the device of all.
    """

    def __new__(cls, call: HeadCall, compute: Rows, none: Tensor, rows: torch.Size) -> "LazyLogits":
        """See the class."""
        shape = (*rows, none.shape[-1])
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=none.dtype, device=none.device, requires_grad=False
        )
        return made  # type: ignore[no-any-return]

    def __init__(self, call: HeadCall, compute: Rows, none: Tensor, rows: torch.Size) -> None:
        """See the class."""
        self._call, self._compute, self._none = call, compute, none
        self._computed: Tensor | None = None

    @property
    def can_be_taken(self) -> bool:
        """Whether the loss can do without them: not if they are there, and perhaps written to, or moved."""
        hidden = self._call.hidden
        return self._computed is None and hidden is not None and hidden.device == self.device

    def by_rows(self) -> tuple[Tensor, Rows]:
        """hidden and what makes logits of its rows, for the loss."""
        assert self._call.hidden is not None
        self._call.taken = True
        return self._call.hidden, self._compute

    def read(self) -> Tensor:
        """The logits, with their graph.

        Raises:
            RuntimeError: The model's forward is over.
        """
        if self._computed is None:
            if self._call.hidden is None:
                raise RuntimeError(
                    'a model with loss="chunked" never has all the logits of a call with labels; for '
                    "outputs.logits call it under torch.no_grad() or without labels, or train with "
                    'fastlora.accelerate(model, loss="model")'
                )
            # records also where somebody looks without gradients: the loss wants them
            with torch.inference_mode(False):
                self._computed = self._compute(self._call.hidden)
        return self._computed

    def settled(self) -> Tensor:
        """What a model's forward returns for these: logits, unless nothing but the loss wanted them."""
        return self if self._computed is None and self._call.taken else self.read()

    def then(self, func: Any, args: Any, kwargs: Any) -> "LazyLogits":
        """A function of each element on these."""
        compute = self._compute
        none = func(self._none, *args, **kwargs)
        return LazyLogits(
            self._call, lambda rows: func(compute(rows), *args, **kwargs), none, self.shape[:-1]
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Without reading them."""
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A fact, a step more, or the function on the logits."""
        kwargs = kwargs or {}
        if func in _KNOWN:
            known: Any = super().__torch_function__
            return known(func, types, args, kwargs)
        first, *others = args or [None]
        numbers = not any(isinstance(other, Tensor) for other in (*others, *kwargs.values()))
        if numbers and isinstance(first, cls) and first._computed is None:
            spent = first._call.hidden is None
            if func in (_HANDED_ON if spent else _ELEMENTWISE):
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
def made_lazily(head: nn.Module) -> Iterator[list[HeadCall]]:
    """A context in which a head's forward returns :class:`LazyLogits`; gives the calls of it."""
    own = vars(head).get("forward")
    calls: list[HeadCall] = []
    head.forward = functools.partial(_lazily, calls, head.forward)
    try:
        yield calls
    finally:
        for call in calls:
            call.end()
        if own is None:
            del head.forward
        else:
            head.forward = own


def settled(outputs: Any) -> Any:
    """A model's outputs with logits in them wherever more than the loss wanted them."""

    def is_leaf(part: Any) -> bool:
        return not isinstance(part, tuple | list | dict)

    return tree_map_only(LazyLogits, LazyLogits.settled, outputs, is_leaf=is_leaf)


def _lazily(calls: list[HeadCall], forward: Rows, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or type(hidden) is not Tensor or not torch.is_grad_enabled():
        return forward(hidden, *args, **kwargs)
    calls.append(HeadCall(forward, hidden))
    # recorded: autocast keeps the weights that it casts here
    none = forward(hidden[..., :0, :]).detach()
    return LazyLogits(calls[-1], calls[-1].logits, none, hidden.shape[:-1])
