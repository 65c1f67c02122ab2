"""A GPU for Triton whose launches are executed on the CPU: ``kernel[grid](cpu tensors)`` of unchanged code.

Everything up to PTX is Triton's own, the specialisation on values and addresses included; the assembler and
the launch are replaced.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as active_driver

from tests.launch.cards import CARDS
from tests.launch.parameters import expected_parameters
from tests.ptx.decode import decode
from tests.ptx.engine import Engine, TensorMap
from tests.ptx.execute import Launch, Memory, Outcome, execute

# bytes, by the number that a map has for its swizzle
_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}


class WrongCode(AssertionError):
    """The compiled code did something that no right code does."""


class ExecutedGpu:
    """Stands where CUDA's driver would; install it once, before the first launch.

    Args:
        cache: Folder that keeps the executor and compiled kernels.
        target: The architecture, ``sm_80`` or ``sm_90``; may be changed between launches.

    Attributes:
        outcomes: What each launch did, the last one last.
        text: The PTX that was launched last, as Triton wrote it.
        edit: Changes PTX before it is decoded.
    """

    def __init__(self, cache: Path, target: str) -> None:
        self.engine, self.cache, self.target = Engine(cache), cache, target
        self.outcomes, self.text = list[Outcome](), ""
        self.edit: Callable[[str], str] | None = None
        self._decoded = functools.lru_cache(maxsize=64)(lambda text: decode(text, self.engine))

    def install(self) -> None:
        """Let Triton launch here."""
        assert not triton.knobs.runtime.interpret, "Triton's interpreter is on"
        triton.knobs.cache.dir = str(self.cache / "triton")
        triton.knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
        active_driver.set_active(_Driver(self))

    def run(self, source: Any, metadata: Any, grid: tuple[int, int, int], text: str, arguments: Any) -> None:
        """Execute a launch.

        Args:
            source: Triton's source of the compiled kernel.
            metadata: Of the compiled kernel.
            grid: Programs along each axis.
            text: Its PTX.
            arguments: One for each name of its signature.

        Raises:
            WrongCode: It did something that no right code does.
        """
        self.text = text
        program = self._decoded(text if self.edit is None else self.edit(text))
        parameters = [
            each.start.ljust(each.size, b"\0") for each in expected_parameters(source.signature, arguments)
        ]
        # scratch memory, which no kernel of ours asks for
        parameters += [bytes(size) for _, size in program.parameters[len(parameters) :]]
        described = iter(getattr(metadata, "tensordesc_meta", None) or ())
        maps = [_map(value, next(described)) for value in arguments if hasattr(value, "block_shape")]
        memory = list(_memory(source.signature, arguments))
        launch = Launch(grid, metadata.num_warps, metadata.shared, parameters, memory, maps)
        outcome = execute(program, launch, self.engine)
        self.outcomes.append(outcome)
        if outcome.findings:
            raise WrongCode("\n".join([f"{program.name} on a grid of {grid}:", *outcome.findings[:12]]))


class _Driver(DriverBase):  # type: ignore[misc]
    def __init__(self, gpu: ExecutedGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": CARDS[gpu.target].shared_bytes},
            load_binary=lambda name, binary, shared, device: (1, bytes(binary).decode(), 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = functools.partial(_launcher, gpu)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.gpu.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device
        return int(self.gpu.target.removeprefix("sm_"))

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.get_current_device(), 10)

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, type_name: str) -> str:
        return type_name

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed here")


def _launcher(gpu: ExecutedGpu, source: Any, metadata: Any) -> Callable[..., None]:
    def launch(x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        # packed metadata, launch metadata, two hooks
        gpu.run(source, metadata, (x, y, z), function, rest[4:])

    return launch


def _stop_at_ptx(
    _: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str] | None:
    """Triton's hook: the binary is the PTX itself. Without stages it asks for a key of what the hook does."""
    if stages is None:
        return "executed", "executed"
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


def _map(descriptor: Any, meta: Any) -> TensorMap:
    """What Triton's launcher makes of a descriptor, and the driver takes."""
    base, (rows, cols) = descriptor.base, meta["block_size"]
    made = TensorMap(
        start=base.data_ptr(), element_bytes=meta["elem_size"], swizzle=_SWIZZLES[meta["swizzle"]],
        shape=tuple(descriptor.shape), stride=descriptor.strides[0], box=(rows, cols),
    )  # fmt: skip
    inner = cols * made.element_bytes
    assert (made.start % 16, made.stride * made.element_bytes % 16, inner % 16) == (0, 0, 0)
    assert max(rows, cols) <= 256
    assert made.swizzle == 0 or inner <= made.swizzle
    return made


def _memory(signature: dict[str, str], arguments: Any) -> Iterator[Memory]:
    """Exactly the elements of each tensor, which is contiguous or has rows at a distance."""
    for (name, kind), value in zip(signature.items(), arguments, strict=True):
        if kind == "constexpr" or not (kind.startswith("*") or kind.startswith("tensordesc")):
            continue
        tensor: Tensor = value if isinstance(value, Tensor) else value.base
        size = tensor.element_size()
        if tensor.is_contiguous():
            yield Memory(name, tensor.data_ptr(), tensor.numel() * size)
            continue
        rows, cols = tensor.shape
        assert tensor.stride(1) == 1
        stride = tensor.stride(0) * size
        yield Memory(name, tensor.data_ptr(), (rows - 1) * stride + cols * size, cols * size, stride)
