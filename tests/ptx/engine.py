"""The executor in C, built once and kept, and the structures of ``executor.h``."""

import ctypes as c
import functools
import platform
from collections.abc import Callable
from pathlib import Path

from tests.c_library import kept_library

_SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h"))
# AVX2, which PyTorch's own fast paths need, and no more: a kept library may come to another CPU. Products are
# rounded before they are added, as PTX says
_OPTIONS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-lm")
_CPU = ("-march=x86-64-v3",) if platform.machine() == "x86_64" else ()

SHARED_START = 1024
MAPS, MAP_BYTES = 0x7E0000000000, 128
MOST_WARPS, MOST_FINDINGS = 16, 64


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Instruction(c.Structure):
    """One step of a program."""

    _fields_ = [
        *_fields(c.c_int32, "operation predicate negated results sources operands a b c unused"),
        *_fields(c.c_int64, "offset source_offset"),
    ]


class Buffer(c.Structure):
    """Memory that a kernel may touch."""

    _fields_ = [
        *_fields(c.c_uint64, "start bytes row_bytes stride"),
        *_fields(c.c_void_p, "writer reader"),
    ]


class Finding(c.Structure):
    """What no right program does."""

    _fields_ = [
        *_fields(c.c_int32, "kind instruction cta warp lane size other other_instruction"),
        ("address", c.c_uint64),
    ]


class TensorMap(c.Structure):
    """A tensor of two axes, for TMA."""

    _fields_ = [
        ("start", c.c_uint64),
        *_fields(c.c_int32, "element_bytes swizzle"),
        ("shape", c.c_int64 * 2),
        ("stride", c.c_int64),
        ("box", c.c_int32 * 2),
    ]


COUNTS = ("executed", "sectors", "least_sectors", "waves", "least_waves")


class Engine:
    """The library.

    Args:
        cache: Folder that keeps it.

    Attributes:
        operations: Number by name.
        types: Number by name.
        findings: What each kind of finding says.
        run: Runs a launch.
    """

    def __init__(self, cache: Path) -> None:
        self._library = c.CDLL(str(kept_library(_SOURCES, cache, "executor.so", *_CPU, *_OPTIONS)))
        self.operations = {name: index for index, name in enumerate(self._names("operation_name"))}
        self.types = {name: index for index, name in enumerate(self._names("type_name"))}
        self.findings = self._names("finding_name")
        self.run: Callable[[object], None] = self._library.run

    def _names(self, function: str) -> list[str]:
        get = getattr(self._library, function)
        get.restype, names = c.c_char_p, list[str]()
        while (name := get(len(names))) is not None:
            names.append(name.decode())
        return names

    @functools.cached_property
    def launch_type(self) -> type[c.Structure]:
        """``Launch`` of ``executor.h``, which counts findings of every kind."""

        class Launch(c.Structure):
            _fields_ = [
                *_fields(c.c_void_p, "instructions operands registers defined buffers maps counts findings"),
                ("limit", c.c_uint64),
                ("kinds", c.c_uint64 * len(self.findings)),
                *_fields(
                    c.c_int32,
                    "units warps shared_bytes shared_start buffer_count map_count finding_count thread_unit",
                ),
                ("cta_unit", c.c_int32 * 3),
                ("grid", c.c_int32 * 3),
            ]

        return Launch
