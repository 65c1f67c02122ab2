"""Launching kernels: through Triton the first time, after that without binding and specialising again."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_kernels.kernel import Kernel
from fastlora_kernels.tile import Tile

_RUNTIME = knobs.runtime
_TRITON = ".".join(triton.__version__.split(".")[:2])
# the versions whose launcher in C is known, and whether it takes a kernel's arguments as one
_ARGUMENTS_AS_ONE = {"3.6": False, "3.7": True, "3.8": True, "3.9": True}


class Launch(NamedTuple):
    """A launch that went through Triton, so that it can be repeated with other tensors laid out alike.

    Attributes:
        run: Launches the compiled kernel on a stream, given all of its arguments.
        stream: Gives the device's current stream.
        rest: The kernel's arguments after its tensors.
        descriptors: Positions of the tensors that are read through descriptors, with what makes one.
    """

    run: Callable[[int, tuple[Any, ...]], None]
    stream: Callable[[], int]
    rest: tuple[Any, ...]
    descriptors: tuple[tuple[int, Callable[[torch.Tensor], Any]], ...]


class Ready:
    """A launcher and its settings for calls whose tensors are all laid out alike.

    Triton binds and specialises the arguments of every launch anew, in some 20 µs of the host. The first call
    goes that way, and compiles what isn't compiled yet. The others repeat its launch in some 2 µs: whoever
    calls answers for tensors with the dtypes, strides and alignment of the first.
    """

    __slots__ = ("_again", "_launcher")

    def __init__(self, launcher: Callable[..., Launch | None], **settings: Any) -> None:
        """See the class.

        Args:
            launcher: Takes the kernel's tensors in its order, and gives the launch back.
            settings: The launcher's other arguments.
        """
        self._launcher = functools.partial(launcher, **settings)
        self._again: Launch | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch the kernel on the current device and stream.

        Args:
            tensors: The kernel's tensors in its order.
        """
        again = self._again
        if again is None or _watched():
            self._again = self._launcher(*tensors)
            return
        run, stream, rest, descriptors = again
        if descriptors:
            operands: list[Any] = [*tensors]
            for i, describe in descriptors:
                operands[i] = describe(operands[i])
            run(stream(), (*operands, *rest))
        else:
            run(stream(), tensors + rest)


def launch(function: Any, kernel: Kernel, tile: Tile, grid: tuple[int, ...]) -> Callable[..., Launch | None]:
    """``function[grid]`` with all that a tile settles; it takes the other arguments by name.

    Args:
        function: The ``@triton.jit`` function.
        kernel: The function's record.
        tile: Block sizes, warps and stages.
        grid: Programs along each of up to three axes.
    """
    return start(function, grid, **_settled(kernel, tile))


def start(function: Any, grid: tuple[int, ...], **settled: int) -> Callable[..., Launch | None]:
    """``function[grid]`` with some arguments settled; where an axis is 0 long, there is nothing to do.

    Args:
        function: The ``@triton.jit`` function.
        grid: Programs along each of up to three axes.
        settled: Constexprs and the compiler's options.

    Returns:
        A function that launches, and returns the launch to repeat; None where nothing was compiled.
    """

    def launched(**arguments: Any) -> Launch | None:
        compiled = function[grid](**arguments, **settled)
        # the interpreter has nothing to show
        return None if compiled is None else _repeated(function, grid, compiled, arguments | settled)

    return _nothing if 0 in grid else launched


def _repeated(function: Any, grid: tuple[int, ...], compiled: Any, arguments: Mapping[str, Any]) -> Launch:
    values = [arguments[name] for name in function.arg_names]
    tensors = sum(name.endswith(("_ptr", "_desc")) for name in function.arg_names)
    descriptors = tuple(
        (i, _described_like(value))
        for i, value in enumerate(values[:tensors])
        if isinstance(value, TensorDescriptor)
    )
    active = driver.active
    stream = functools.partial(active.get_current_stream, active.get_current_device())
    return Launch(_runner(compiled, (*grid, 1, 1)[:3]), stream, tuple(values[tensors:]), descriptors)


def _runner(compiled: Any, grid: tuple[int, ...]) -> Callable[[int, tuple[Any, ...]], None]:
    """What launches a compiled kernel: Triton's launcher in C where its form is known, else what wraps that.

    The wrapper finds out at every launch that the kernel wants no memory of its own.
    """
    launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    wants = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    # by name: a Triton that was built for AMD alone has no such module
    for_cuda = type(launcher).__module__ == "triton.backends.nvidia.driver"
    as_one = _ARGUMENTS_AS_ONE.get(_TRITON)
    if as_one is None or not for_cuda or any(getattr(launcher, name, 0) for name in wants):
        return lambda stream, arguments: launcher(
            *grid, stream, function, metadata, None, None, None, *arguments
        )
    launch, kind = launcher.launch, (launcher.launch_cooperative_grid, launcher.launch_pdl)
    # neither launch metadata nor hooks nor scratch memory
    if not as_one:
        return lambda stream, arguments: launch(
            *grid, stream, function, *kind, None, None, metadata, None, None, None, *arguments
        )
    last = (launcher.arg_annotations, launcher.kernel_signature)
    return lambda stream, arguments: launch(
        *grid, stream, function, *kind, metadata, None, None, None, None, None, *last, arguments
    )


def _described_like(descriptor: TensorDescriptor) -> Callable[[torch.Tensor], TensorDescriptor]:
    """What describes other tensors laid out alike, without the checks and without keeping this one."""
    layout = {name: value for name, value in vars(descriptor).items() if name != "base"}

    def describe(tensor: torch.Tensor) -> TensorDescriptor:
        other = object.__new__(TensorDescriptor)
        vars(other).update(layout, base=tensor)
        return other

    return describe


@functools.lru_cache(maxsize=4096)
def _settled(kernel: Kernel, tile: Tile) -> dict[str, int]:
    return {**kernel.blocks(tile), **kernel.options(tile)}


def _nothing(**_: object) -> None:
    pass


def _watched() -> bool:
    """Whether a profiler wants to hear of every launch."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
