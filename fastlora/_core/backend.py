"""Which implementation runs. The only file of the package that reads the environment.

``FASTLORA_BACKEND`` sets the backend of a process (``auto``, ``triton``, ``torch`` or ``reference``),
``FASTLORA_CACHE`` the folder of the choices that ``fastlora tune`` measured.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Backend = Literal["triton", "torch", "reference"]

BACKENDS = ("auto", "triton", "torch", "reference")
KERNEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# looked up once: torch.compile can't trace the question
_TRITON_FOUND = importlib.util.find_spec("triton") is not None
_selected = os.environ.get("FASTLORA_BACKEND", "auto")

_T = TypeVar("_T")
# of questions that torch.compile can't trace either
_asked_outside_of_graphs: Callable[[Callable[[], _T]], Callable[[], _T]] = (
    torch.compiler.assume_constant_result
)


def cache_folder() -> Path:
    """Where choices measured on this machine are kept: ``FASTLORA_CACHE``, or the user's cache folder."""
    given = os.environ.get("FASTLORA_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastlora"


def launched_rank() -> int:
    """Number of this process among those that a launcher such as torchrun started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def set_backend(name: str) -> None:
    """Choose the implementation for every fastlora op of this process.

    Args:
        name: ``"auto"`` chooses by device and dtype; ``"triton"`` runs the fused kernels (CUDA tensors, or
            CPU tensors when Triton's interpreter is on); ``"torch"`` runs the same graph on library matrix
            products; ``"reference"`` runs the eager formula. A backend asked for by name never falls back.

    Raises:
        ValueError: ``name`` is none of these.

    Example:
        >>> import fastlora
        >>> fastlora.set_backend("auto")
    """
    global _selected
    _selected = _known(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Like :func:`set_backend`, for the length of a ``with`` block, in every thread.

    Where activations are recomputed (``torch.utils.checkpoint``), backward belongs into the block too.

    Example:
        >>> import fastlora
        >>> with fastlora.use_backend("reference"):
        ...     pass
    """
    global _selected
    before, _selected = _selected, _known(name)
    try:
        yield
    finally:
        _selected = before


def resolve(device: torch.device, dtype: torch.dtype, *tensors: Tensor) -> Backend:
    """The backend that serves tensors of this device and dtype.

    Args:
        device: Where it computes.
        dtype: What it computes in.
        tensors: Tensors that may be nested, quantised or sharded, which the eager formula alone takes.

    Raises:
        ValueError: The selected backend can't serve them.
    """
    name = _known(_selected)
    composite = next(filter(_is_composite, tensors), None)
    if composite is not None and name in ("auto", "reference"):
        return "reference"
    if composite is not None:
        raise ValueError(
            f"backend {name!r} serves plain tensors, got a {type(composite).__name__} "
            f"({composite.layout}); use fastlora.set_backend('auto'), which takes the eager formula for it"
        )
    if name == "auto":
        return _automatic(device, dtype)
    if name == "triton":
        _require_triton(device, dtype)
    return cast(Backend, name)


def selected() -> str:
    """The backend that was asked for."""
    return _selected


def is_automatic() -> bool:
    """Whether fastlora chooses, so that a plan may prefer library products to the kernels."""
    return _selected == "auto"


def triton_available() -> bool:
    """Whether the kernels can be imported."""
    return _TRITON_FOUND


@functools.cache
@_asked_outside_of_graphs
def launch_failure() -> str:
    """Why Triton can't launch kernels on this machine's GPU; empty where it can, and where there is none.

    Triton builds its launcher with a C compiler and Python's headers at run time; slim images have neither.
    """
    if not torch.cuda.is_available():
        return ""
    try:
        import triton

        _ = triton.runtime.driver.active.utils
        _check_compiler(triton.__version__)
    except Exception as error:
        # Triton raises plain RuntimeErrors here, and whatever its build steps raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return (
            f"Triton can't launch kernels here ({said}); it needs a C compiler, gcc for instance, "
            "and Python's headers"
        )
    return ""


def _check_compiler(triton_version: str) -> None:
    # until Triton 3.7 every new kernel has a launcher of its own, whatever a cache holds of the rest
    if tuple(map(int, triton_version.split(".")[:2])) >= (3, 7):
        return
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        raise RuntimeError("there is neither gcc nor clang, and CC names no other")


def _launches() -> bool:
    # torch.compile could not trace the question, and needs the same compiler itself
    return torch.compiler.is_compiling() or _can_launch()


# told once
@functools.cache
def _can_launch() -> bool:
    failure = launch_failure()
    if failure:
        warnings.warn(f"{failure}; fastlora uses library products instead", stacklevel=2)
    return not failure


@functools.cache
@_asked_outside_of_graphs
def interpreter_enabled() -> bool:
    """Whether Triton runs kernels in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    if not triton_available():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def untuned_environment(folder: Path) -> dict[str, str]:
    """The environment of a process for which nothing was measured: as this one's is, with another cache.

    Args:
        folder: The cache's: an empty one, or none yet.
    """
    return os.environ | {"FASTLORA_CACHE": str(folder)}


def interpreter_environment() -> dict[str, str]:
    """This process's environment, with Triton's interpreter switched on, for a child process."""
    return os.environ | {"TRITON_INTERPRET": "1"}


def are_plain(*values: object) -> bool:
    """Whether all tensors among these are torch's own, whose memory kernels may read."""
    return all(type(each) in (Tensor, nn.Parameter) for each in values if isinstance(each, Tensor))


def _is_composite(tensor: Tensor) -> bool:
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return tensor.is_nested
    return tensor.is_nested or is_traceable_wrapper_subclass(tensor)


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"expected a backend out of {', '.join(BACKENDS)}, got {name!r}; "
            "set it with fastlora.set_backend(...) or FASTLORA_BACKEND"
        )
    return name


def _automatic(device: torch.device, dtype: torch.dtype) -> Backend:
    if dtype not in KERNEL_DTYPES.values() or _is_transforming():
        return "reference"
    return "triton" if device.type == "cuda" and triton_available() and _launches() else "torch"


def is_watched() -> bool:
    """Whether a mode, a transform or a tracer sees every operation, or wants operations that it knows."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing() or _is_transforming()


def _is_transforming() -> bool:
    """Whether torch.func, forward-mode differentiation or TorchScript want operations that they know."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _require_triton(device: torch.device, dtype: torch.dtype) -> None:
    if not triton_available():
        raise ValueError(
            "backend 'triton' was asked for, but the package triton is not installed; "
            "install it or use fastlora.set_backend('torch')"
        )
    if device.type != "cuda" and not (device.type == "cpu" and interpreter_enabled()):
        raise ValueError(
            f"backend 'triton' serves CUDA tensors, got a tensor on {device}; move it to the GPU, "
            "use fastlora.set_backend('torch'), or start Python with TRITON_INTERPRET=1 to debug on CPU"
        )
    if device.type == "cuda" and launch_failure():
        raise ValueError(
            f"backend 'triton' was asked for, but {launch_failure()}; install them or use "
            "fastlora.set_backend('torch')"
        )
    if dtype not in KERNEL_DTYPES.values():
        raise ValueError(
            f"backend 'triton' serves float32, float16 and bfloat16, got {dtype}; "
            "use fastlora.set_backend('reference') for other dtypes"
        )
