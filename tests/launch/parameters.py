"""What must arrive at a driver for the arguments of a launch."""

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

MAP_BYTES = 128
# as driver.c marks its tensor maps, and the bit of their second word that it sets
_MAGIC, _WORD = 0x70614D72736E6554, 1 << 21
_FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}
# for scratch memory, after ours
_OWN_PARAMETERS = 2


class Problem(Exception):
    """What a GPU would choke on."""


class Expected(NamedTuple):
    """A parameter.

    Attributes:
        name: The argument, or the part of it, that this is.
        size: In bytes.
        start: The first of its bytes; the others don't matter.
    """

    name: str
    size: int
    start: bytes


def check_specialisation(source: Any, arguments: tuple[Any, ...]) -> None:
    """A kernel runs on what it was compiled for: constants, and numbers and addresses that 16 divides.

    Args:
        source: Triton's source of the compiled kernel.
        arguments: One for each name of its signature.

    Raises:
        Problem: An argument is something else.
    """
    names = list(source.signature)
    if len(arguments) != len(names):
        raise Problem(f"{len(arguments)} arguments for {len(names)} names")
    for (index, *_), constant in source.constants.items():
        if arguments[index] != constant:
            raise Problem(f"compiled for {names[index]} = {constant}, launched with {arguments[index]}")
    for (index, *_), attributes in source.attrs.items():
        value = arguments[index]
        if ["tt.divisibility", 16] in attributes and _number(value) % 16:
            raise Problem(f"compiled for a {names[index]} that 16 divides, launched with {_number(value)}")


def check_parameters(source: Any, arguments: tuple[Any, ...], arrived: list[bytes]) -> None:
    """Every argument arrives in the place that the compiled kernel reads it from.

    Args:
        source: Triton's source of the compiled kernel.
        arguments: One for each name of its signature.
        arrived: The kernel's parameters at the driver, in the compiled kernel's order.

    Raises:
        Problem: One is missing or another.
    """
    expected = list(expected_parameters(source.signature, arguments))
    if len(arrived) != len(expected) + _OWN_PARAMETERS:
        raise Problem(
            f"the cubin takes {len(arrived)} parameters, {len(expected)} and {_OWN_PARAMETERS} are passed"
        )
    for (name, size, start), got in zip(expected, arrived, strict=False):
        if size == MAP_BYTES and got[:8] + got[16:48] == start[:8] + start[16:] and got[8:16] != start[8:16]:
            raise Problem(
                f"Triton's driver.c takes the tensor of {name} for a small one, because its int overflows at "
                "2 GiB, and clears a bit of the tensor map"
            )
        if len(got) != size or not got.startswith(start):
            raise Problem(f"{name} arrives as {got[:48].hex()} instead of {start.hex()}")


def _number(value: Any) -> int:
    return int(value if isinstance(value, int) else value.data_ptr())


def expected_parameters(signature: dict[str, str], arguments: tuple[Any, ...]) -> Iterator[Expected]:
    """The parameters of a compiled kernel, without those for scratch memory.

    Args:
        signature: Type by name, as Triton specialised it.
        arguments: One for each name.

    Raises:
        Problem: An address is null.
    """
    for (name, kind), value in zip(signature.items(), arguments, strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            # an empty tensor has no address, and a mask keeps the kernel away from it
            if value.data_ptr() == 0 and value.numel():
                raise Problem(f"{name} is a null pointer")
            yield Expected(name, 8, struct.pack("<Q", value.data_ptr()))
        elif kind.startswith("tensordesc"):
            yield from _descriptor(name, value)
        else:
            number = struct.pack(_FORMATS[kind], value)
            yield Expected(name, len(number), number)


def _descriptor(name: str, descriptor: Any) -> Iterator[Expected]:
    """A tensor map, then shape and strides once more."""
    base, size = descriptor.base, descriptor.base.element_size()
    stride = descriptor.strides[0] * size
    last = sum((each - 1) * step for each, step in zip(descriptor.shape, (stride, size), strict=True))
    # CUTLASS clears the bit for small tensors, and Triton after it
    word = 0 if last + 1 < 128 * 1024 and _triton_clears_a_bit() else _WORD
    fields = (_MAGIC, word, base.data_ptr(), *reversed(descriptor.shape), stride)
    yield Expected(name, MAP_BYTES, struct.pack("<6Q", *fields))
    for each in descriptor.shape:
        yield Expected(f"{name}.shape", 4, struct.pack("<i", each))
    for each in descriptor.strides:
        yield Expected(f"{name}.strides", 8, struct.pack("<q", each))


@functools.cache
def _triton_clears_a_bit() -> bool:
    return "1llu << 21" in (Path(triton.__file__).parent / "backends" / "nvidia" / "driver.c").read_text(
        "utf-8"
    )
