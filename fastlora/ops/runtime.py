"""What every op needs of torch: registration, autocast, layouts, the mask's seed, no second derivative."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlora._core import backend as _backend
from fastlora.ops.decide import WITHOUT_PATHS

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LIBRARY = torch.library.Library("fastlora", "DEF")
_AS_IT_IS = contextlib.nullcontext()


def registered(fake: Callable[..., Any]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make ``torch.ops.fastlora.NAME`` of a function, for every device and for tracing.

    The function is called with positional arguments, its :class:`Decision` last: as it is where that may be,
    else through torch's dispatcher, which costs 40 µs and serves tracing. A schema knows neither decisions
    nor results that are None: of a decision it passes the backend's name, for None it gives an empty tensor.

    Args:
        fake: Tensors of the results' shapes and dtypes, given the arguments with the name for the decision.
    """

    def register(function: Callable[_P, _R]) -> Callable[_P, _R]:
        name = function.__name__.lstrip("_")
        names = list(inspect.signature(function).parameters)
        seed_at = names.index("seed") if "seed" in names else None
        direct: Callable[..., Any] = function

        def dispatched(*arguments: Any) -> Any:
            result = direct(*arguments[:-1], WITHOUT_PATHS[arguments[-1]])
            if not isinstance(result, tuple):
                return result
            return tuple(arguments[0].new_empty(0) if each is None else each for each in result)

        _LIBRARY.define(name + _schema(function))
        _LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastlora::{name}", fake, lib=_LIBRARY)
        packet = getattr(torch.ops.fastlora, name)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            decision = arguments[-1]
            # the forward pass of a known signature was looked at by whoever found that
            if seed_at is not None and decision.known is not None:
                return direct(*arguments)
            seed = None if seed_at is None else arguments[seed_at]
            # backward gets what its forward pass kept
            others = () if seed_at is None else arguments[1:seed_at]
            if _runs_directly(decision.backend, arguments[0], others, seed):
                return direct(*arguments)
            return packet(*arguments[:-1], decision.backend)

        return cast(Callable[_P, _R], call)

    return register


def _schema(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    *parameters, decision = signature.parameters.values()
    results = get_args(signature.return_annotation)

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, decision.replace(annotation=str)],
        return_annotation=tuple[(Tensor,) * len(results)] if results else Tensor,  # type: ignore[misc]
    )
    return torch.library.infer_schema(prototype, mutates_args=())


def _runs_directly(backend: str, first: Tensor, others: Sequence[Tensor | None], seed: Tensor | None) -> bool:
    """Whether a function may be called without the dispatcher.

    Library products trace like any others. The kernels take real tensors alone, and of a seed the value is
    read: then nothing may be watching the call.
    """
    if torch.compiler.is_compiling():
        return False
    if backend == "torch" and seed is None:
        return True
    return (
        type(first) in (Tensor, Parameter)
        and not first.is_meta
        and (seed is None or (type(seed) is Tensor and not seed.is_meta))
        and not _backend.is_watched()
        and (not others or _backend.are_plain(*others))
    )


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast would compute in for this tensor; None where it does not apply."""
    device_type = tensor.device.type
    # asking about a device that knows no autocast, meta for one, is an error in torch
    if tensor.dtype == torch.float64 or device_type == "meta":
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def unrecorded(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given and autograd records nothing.

    Entering ``torch.no_grad`` once more than needed would cost a tenth of a small call.
    """
    if autocast_dtype(tensor) is None:
        return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS
    contexts = contextlib.ExitStack()
    contexts.enter_context(torch.no_grad())
    contexts.enter_context(without_autocast(tensor))
    return contexts


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given."""
    if autocast_dtype(tensor) is None:
        return _AS_IT_IS
    return torch.autocast(tensor.device.type, enabled=False)


def current_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context with the tensor's GPU as the current one, where kernels launch."""
    index = tensor.get_device()
    return _AS_IT_IS if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype. ``Tensor.to`` costs a microsecond also where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor ``[..., K]`` as a matrix ``[M, K]``."""
    if tensor.dim() == 2:
        return tensor
    # flatten keeps zero-sized dimensions apart, where reshape(-1, …) can't infer the row count
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def row_major(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous and apart from each other, else a contiguous copy.

    A broadcast or overlapping row is a stride that tensor descriptors don't take.
    """
    rows, cols = matrix.shape
    apart = rows < 2 or matrix.stride(0) >= cols
    return matrix if cols == 0 or (matrix.stride(1) == 1 and apart) else matrix.contiguous()


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its elements lie one after the other, else a copy."""
    return tensor.contiguous()


def packed(matrix: Tensor) -> Tensor:
    """The matrix itself, or a copy without margins where a library product could read them.

    oneDNN's products on Intel's AMX take 16-bit numbers in pairs. Of a line of odd length that is followed by
    a margin, as in ``x[:, :37]``, they read the margin's first number too and count on its being finite:
    times zero, a NaN or an infinity there makes the whole result NaN.

    Args:
        matrix: ``[rows, columns]`` with any strides, on any device.
    """
    if matrix.element_size() != 2 or not matrix.is_cpu:
        return matrix
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    if column_stride == 1:
        reads_margin = columns % 2 == 1 and row_stride != columns
    else:
        reads_margin = rows % 2 == 1 and row_stride == 1 and column_stride != rows
    # not .contiguous(): to it a single row of a wider matrix is packed already
    return matrix.clone(memory_format=torch.contiguous_format) if reads_margin else matrix


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Seed of a dropout mask, int64 ``[1]``, from torch's generator."""
    # on the tensors' own device, so that a GPU is never synchronised with the host
    return torch.randint(2**62, (1,), device=device, dtype=torch.int64, generator=generator)


def refuse_second_derivative(
    op: str, ctx: Any, dys: Sequence[Tensor | None], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients; under ``create_graph`` they depend on their sources and refuse to be differentiated."""
    if not torch.is_grad_enabled():
        return gradients
    sources = [t for t in (*dys, *ctx.saved_tensors) if t is not None and t.requires_grad]
    return tuple(g if g is None else _SecondDerivative.apply(op, g, *sources) for g in gradients)


class _SecondDerivative(torch.autograd.Function):
    """A gradient that depends on its sources, and says what to do when somebody differentiates it."""

    @staticmethod
    def forward(op: str, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            f"the fused {ctx.op} has no second derivative; run the forward pass under "
            "fastlora.use_backend('reference') to differentiate twice"
        )
