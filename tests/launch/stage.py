"""A GPU that isn't there: torch, Triton and our own code believe in it, and every launch on it is checked.

Tensors lie in the CPU's memory and say that they are on the second of two GPUs. Triton specialises, compiles,
binds and launches as ever, through its own C launcher, linked to ``driver.c``. Nothing of fastlora is
replaced. AMD has no stand-in driver: kernels are compiled and bound for it, and the launch ends in Python.
"""

import ctypes
import os
import sysconfig
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.amd.driver import HIPDriver
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver as active_driver
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.c_library import compile_c, kept_library
from tests.launch.cards import CARDS, Card
from tests.launch.parameters import Problem, check_parameters, check_specialisation

# where all tensors are; launches outside a guard land on the first
DEVICE = torch.device("cuda", 1)
_STREAM = 0x5EED0
_SOURCE = Path(__file__).with_name("driver.c")
# not libcuda.so.1, which torch's own CUDA runtime would find, too
_LIBRARY = "libstandincuda.so.1"
_FACTORIES = ("arange", "empty", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros")


class _Arrived(ctypes.Structure):
    """``Launch`` of ``driver.c``."""

    _fields_ = (
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("parameters", ctypes.c_uint32),
        ("offset", ctypes.c_uint32 * 64),
        ("size", ctypes.c_uint32 * 64),
        ("data", ctypes.c_ubyte * 2048),
    )


class Stage:
    """The GPU of this process; install it once, before anything asks for a device.

    Args:
        target: One of :data:`CARDS`.
        cache: Folder that keeps compiled kernels and the driver between runs.
        checking: Whether launches are looked at; host times are taken without.

    Attributes:
        launches: What was launched: names of functions, grids, and all arguments but tensors.
        seen: The tensors that kernels were given.
        stream: Number of the stream that is current, without the device's.
        compiled: Kernels that were compiled, or found compiled in the cache.
    """

    def __init__(self, target: str, cache: Path, *, checking: bool = True) -> None:
        self.target, self.card, self.cache, self.checking = target, CARDS[target], cache, checking
        self.is_amd = target.startswith("gfx")
        self.capability = (9, 4) if self.is_amd else divmod(int(target.removeprefix("sm_")), 10)
        self.launches, self.compiled = list[tuple[str, list[int], list[Any]]](), list[str]()
        self.current, self.stream, self.seen = 0, _STREAM, list[weakref.ref[torch.Tensor]]()

    def install(self) -> None:
        """Make everybody believe in the GPU."""
        triton.knobs.cache.dir = str(self.cache / "triton")
        # no measured choices
        os.environ["FASTLORA_CACHE"] = str(self.cache / "none")
        if not self.is_amd:
            triton.knobs.build.impl = self._build
            triton.knobs.nvidia.libcuda_path = str(self.cache)
            self.library = _stand_in_driver(self.cache)
            self.library.stand_in_card(*self.capability, *self.card[1:])
        self._deceive_torch()
        active_driver.set_active(self._driver())
        triton.knobs.runtime.jit_post_compile_hook = self._note_compilation

    def driver_error(self) -> str:
        """What the stand-in driver refused last."""
        return bytes(self.library.stand_in_error()).decode()

    def _deceive_torch(self) -> None:
        card = self.card
        properties = SimpleNamespace(
            name=card.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=card.multiprocessors,
            shared_memory_per_block_optin=card.shared_bytes,
            gcnArchName=f"{self.target}:sramecc+:xnack-",
            total_memory=80 * 2**30,
            uuid="a-stand-in",
        )
        cuda: Any = torch.cuda
        cuda.is_available = lambda: True
        cuda.device_count = lambda: 2
        cuda.current_device = lambda: self.current
        cuda.get_device_properties = lambda *device: properties
        cuda.get_device_capability = lambda *device: self.capability
        cuda.device = self.guard
        if self.is_amd:
            torch.version.hip = "6.4"
        tensor: Any = torch.Tensor
        there = torch._C.TensorBase.device.__get__
        tensor.device = property(lambda each: DEVICE if there(each).type == "cpu" else there(each))
        tensor.is_cuda = property(lambda each: there(each).type == "cpu")
        tensor.is_cpu = property(lambda each: False)
        tensor.get_device = lambda each: DEVICE.index
        for name in _FACTORIES:
            setattr(torch, name, _made_on_the_cpu(getattr(torch, name)))
        # autocast asks a card before Ampere for it once, with a tensor that no call of ours waits for
        torch.cuda.is_bf16_supported()

    def guard(self, device: torch.device | int) -> "_Guard":
        """Stands for ``torch.cuda.device``: the GPU that launches go to meanwhile."""
        return _Guard(self, device if isinstance(device, int) else device.index or 0)

    def _driver(self) -> Any:
        """Triton's own, but for what it asks torch and ROCm."""
        driver: Any = object.__new__(HIPDriver) if self.is_amd else CudaDriver()
        launcher = _python_launcher if self.is_amd else driver.launcher_cls
        if self.is_amd:
            driver.utils = _AmdUtils(self.target, self.card)
        driver.get_device_capability = lambda device=0: self.capability
        driver.get_current_device = lambda: self.current
        driver.get_current_stream = lambda device: self.stream + device
        driver.set_current_device = lambda device: None
        driver.launcher_cls = self._checked(launcher) if self.checking else launcher
        return driver

    def _checked(self, launcher: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Makes launchers that look at what arrives, whoever calls them: Triton, or what repeats a launch."""

        def make(source: Any, metadata: Any) -> Any:
            inner, threads = launcher(source, metadata), metadata.num_warps * (64 if self.is_amd else 32)
            if self.is_amd:
                # packed metadata, launch metadata, two hooks
                return lambda *call: self._look(source, threads, call[:4], call[9:], lambda: None)
            inner.unchecked = inner.launch

            def look(*call: Any) -> None:
                arguments = arguments_of(call)
                self._look(source, threads, call[:4], arguments, lambda: inner.unchecked(*call))

            inner.launch = look
            return inner

        return make

    def _look(
        self,
        source: Any,
        threads: int,
        place: tuple[int, ...],
        arguments: Sequence[Any],
        launch: Callable[[], None],
    ) -> None:
        """Launch, look at what arrived, and note it."""
        name, (*grid, stream) = source.fn.__name__, place
        try:
            if stream != self.stream + DEVICE.index:
                raise Problem("outside of the device guard, or on another stream")
            check_specialisation(source, tuple(arguments))
            if self.is_amd:
                _check_amd_limits(grid, threads)
            else:
                before = self.library.stand_in_launches()
                launch()
                if self.library.stand_in_launches() != before + 1:
                    raise Problem("nothing arrived at the driver")
                arrived = self.library.stand_in_last().contents
                _check_place(arrived, tuple(grid), threads, stream)
                check_parameters(source, tuple(arguments), _parameters_of(arrived))
        except (Problem, RuntimeError) as error:
            x, y, z = grid
            raise Problem(f"{name} on a grid of {x} × {y} × {z}: {error}") from error
        tensors = [each.base if isinstance(each, TensorDescriptor) else each for each in arguments]
        self.seen += [weakref.ref(each) for each in tensors if isinstance(each, torch.Tensor)]
        settings = [each for each in arguments if not isinstance(each, torch.Tensor | TensorDescriptor)]
        self.launches.append((name, grid, settings))

    def _note_compilation(self, *, fn: Any, **more: Any) -> None:
        self.compiled.append(fn.name)

    def _build(
        self,
        name: str,
        source: str,
        folder: str,
        library_dirs: list[str],
        include: list[str],
        libraries: list[str],
    ) -> str:
        """Compile one of Triton's C modules, linked to the stand-in driver instead of CUDA's."""
        # the source may be Triton's installed file, the folder is a temporary one
        path, made = (
            Path(folder, f"{name}_stand_in.c"),
            Path(folder, name + sysconfig.get_config_var("EXT_SUFFIX")),
        )
        path.write_text(Path(source).read_text("utf-8").replace("libcuda.so.1", _LIBRARY), "utf-8")
        # Debian's own scheme leads elsewhere
        include = [*include, folder, sysconfig.get_path("include", "posix_prefix")]
        folders = (f"-I{each}" for each in include)
        compile_c([path], made, "-O2", *folders, self.library._name)
        return str(made)


def arguments_of(call: Sequence[Any]) -> Sequence[Any]:
    """The kernel's arguments in a call of Triton's launcher in C: from 3.7 on they are one, the last."""
    return call[-1] if isinstance(call[-1], tuple) else call[13:]


class _Guard:
    def __init__(self, stage: Stage, index: int) -> None:
        self.stage, self.index = stage, index

    def __enter__(self) -> None:
        self.before, self.stage.current = self.stage.current, self.index

    def __exit__(self, *error: object) -> None:
        self.stage.current = self.before


def _made_on_the_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*arguments: Any, device: Any = None, **options: Any) -> Any:
        return factory(*arguments, device="meta" if str(device) == "meta" else None, **options)

    return make


def _stand_in_driver(cache: Path) -> ctypes.CDLL:
    """``driver.c`` as a library, loaded under the name that Triton's modules are linked to."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    # the headers of CUDA come with Triton
    options = ("-O2", f"-I{include}", f"-Wl,-soname,{_LIBRARY}")
    kept = kept_library([_SOURCE], cache / f"driver-{triton.__version__}", _LIBRARY, *options)
    library = ctypes.CDLL(str(kept), mode=ctypes.RTLD_GLOBAL)
    library.stand_in_last.restype = ctypes.POINTER(_Arrived)
    library.stand_in_launches.restype = ctypes.c_long
    library.stand_in_error.restype = ctypes.c_char_p
    return library


class _AmdUtils:
    """The part of Triton's own that asks ROCm."""

    def __init__(self, target: str, card: Card) -> None:
        self.target, self.card = target, card

    def get_device_properties(self, device: int) -> dict[str, int | str]:
        sizes = {"max_shared_mem": self.card.shared_bytes, "multiprocessor_count": self.card.multiprocessors}
        return {"arch": self.target, "warpSize": 64, **sizes}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024


def _python_launcher(source: Any, metadata: Any) -> Callable[..., None]:
    return lambda *arguments: None


def _check_amd_limits(grid: Sequence[int], threads: int) -> None:
    if not (0 < grid[0] < 2**31 and 0 < grid[1] < 65536 and 0 < grid[2] < 65536):
        raise Problem("no such grid")
    if threads > 1024:
        raise Problem(f"{threads} threads")


def _check_place(arrived: _Arrived, grid: tuple[int, ...], threads: int, stream: int) -> None:
    got = (tuple(arrived.grid), tuple(arrived.block), arrived.stream)
    if got != (grid, (threads, 1, 1), stream):
        raise Problem(f"grid, threads and stream arrive as {got}")


def _parameters_of(arrived: _Arrived) -> list[bytes]:
    data = bytes(arrived.data)
    places = list(zip(arrived.offset, arrived.size, strict=True))[: arrived.parameters]
    return [data[offset : offset + size] for offset, size in places]
