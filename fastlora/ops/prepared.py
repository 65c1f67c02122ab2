"""What is found out once for every layout of a call's tensors, so that afterwards it only computes.

On a GPU the host's time counts: checking, choosing paths and tiles and binding arguments anew would cost a
layer as much as its products do.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlora._core import backend
from fastlora.ops.runtime import autocast_dtype, current_device
from fastlora_kernels.choose.pinned import PINNED

_T = TypeVar("_T")

# layouts that are remembered of an op: of a model a dozen, as many again for each length of its batches
_MOST = 2048


class Memory(dict[Hashable, _T]):
    """A dictionary that starts anew when it is full."""

    _all: ClassVar[list["Memory[Any]"]] = []

    def __init__(self) -> None:
        """An empty one."""
        self._all.append(self)

    def __setitem__(self, key: Hashable, value: _T) -> None:
        """Keep a value."""
        if len(self) >= _MOST:
            self.clear()
        super().__setitem__(key, value)

    def of(self, key: Hashable, make: Callable[..., _T], *arguments: Any) -> _T:
        """The value under a key, made of these arguments where there is none."""
        try:
            value = self.get(key)
        except TypeError:
            # a setting that can't be hashed is none that is accepted
            return make(*arguments)
        if value is None:
            value = self[key] = make(*arguments)
        return value

    @classmethod
    def forget_all(cls) -> None:
        """Find everything out anew, as if in a new process."""
        for memory in cls._all:
            memory.clear()


def layouts(*tensors: Tensor | None) -> Hashable:
    """All of these tensors that a launch depends on: dtypes, sizes, strides, alignment, devices."""
    return tuple(
        [
            None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() & 15, t.get_device())
            for t in tensors
        ]
    )


def signature(*tensors: Tensor | None, settings: tuple[Any, ...]) -> Hashable:
    """What decides how a call is computed; None where that can't be told from layouts.

    Args:
        tensors: The call's tensors; the first says whether autocast applies.
        settings: The call's other arguments.
    """
    if torch.compiler.is_compiling() or backend.is_watched():
        return None
    first = tensors[0]
    if first is None or not _all_plain(tensors):
        return None
    # as keys True is 1.0 and False 0.0
    kinds = tuple(map(type, settings))
    try:
        autocast = autocast_dtype(first) if torch._C._is_any_autocast_enabled() else None
        grad = torch.is_grad_enabled()
        # what a graph will launch is loaded for the gradients that are wanted
        wanted = PINNED.tell_hosts_apart and tuple([t is not None and t.requires_grad for t in tensors])
        return layouts(*tensors), settings, kinds, autocast, grad, wanted, _state(first)
    except (AttributeError, RuntimeError, TypeError):
        # without strides or memory: nested and sparse ones
        return None


def _all_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are torch's own with memory: other classes may see every operation.

    Meta tensors are none: to ``get_device`` they and the CPU's are one.
    """
    # a loop costs a third of all()
    for each in tensors:
        if each is not None:
            kind = type(each)
            if (kind is not Tensor and kind is not Parameter) or each.is_meta:
                return False
    return True


def _state(tensor: Tensor) -> Hashable:
    """What decides beside the call: the backend, what was measured, whether a CUDA graph is made."""
    capturing = PINNED.tell_hosts_apart and tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return backend.selected(), PINNED.changes, capturing


def prepared(
    *layers: Callable[[Tensor], Tensor],
) -> Callable[[Callable[..., Callable[..., _T]]], Callable[..., _T]]:
    """Make an op of the function that prepares it.

    That function is called with the op's tensors by position and its settings by name, and returns what
    computes calls with tensors laid out like these, given the tensors. The op takes one setting more,
    ``known``: what :class:`~fastlora.ops.decide.Decision` remembers where it is for one signature alone.

    Args:
        layers: For each of the op's first tensors what lays it out as the kernels read it, ``row_major`` for
            instance.
    """

    def laid_out(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        first = [None if t is None else lay(t) for lay, t in zip(layers, tensors, strict=False)]
        return [*first, *tensors[len(layers) :]]

    def make(prepare: Callable[..., Callable[..., _T]]) -> Callable[..., _T]:
        memory = Memory[Callable[..., _T]]()

        def prepare_as_given(*tensors: Tensor | None, **settings: Any) -> Callable[..., _T]:
            read = laid_out(tensors)
            run = prepare(*read, **settings)
            if all(mine is given for mine, given in zip(read, tensors, strict=True)):
                return run
            return lambda *tensors: run(*laid_out(tensors))

        @functools.wraps(prepare)
        def op(*tensors: Tensor | None, known: dict[Any, Any] | None = None, **settings: Any) -> _T:
            key: Hashable = prepare
            first = tensors[0]
            assert first is not None
            runs: dict[Any, Callable[..., _T]] = known if known is not None else memory
            if known is None:
                key = (layouts(*tensors), *settings.values(), _state(first))
            run = runs.get(key)
            with current_device(first):
                if run is None:
                    run = runs[key] = prepare_as_given(*tensors, **settings)
                return run(*tensors)

        return op

    return make
