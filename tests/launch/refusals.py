"""Is the stage strict? Launches that a GPU would refuse or get wrong, and what the stage says of each."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.partials import _sum_partials_kernel
from fastlora_kernels.tile import Plan, Tile
from tests.launch.library import Library
from tests.launch.stage import DEVICE, Stage, arguments_of

ACCEPTED = "accepted"
_SIZE = 4096


def refusals(stage: Stage) -> dict[str, str]:
    """What the stage says, by what is wrong; :data:`ACCEPTED` where it says nothing."""
    # one more, so that a part of them can start at another address
    partial, out = torch.zeros(1 + 2 * _SIZE), torch.zeros(_SIZE)
    right = (partial[:-1], out, 2, _SIZE, 1024)

    def launch(*grid: int) -> Any:
        return _sum_partials_kernel[grid](*right)

    told = {"no device guard": _said(lambda: launch(4))}
    with stage.guard(DEVICE):
        told["nothing wrong"] = _said(lambda: launch(4))
        told["a grid too tall"] = _said(lambda: launch(1, 70_000))
        told["too much shared memory"] = _said(_too_deep)
        compiled = launch(4)[4, 1, 1]
        told |= {
            "an unaligned address": _said(lambda: compiled(partial[1:], *right[1:])),
            "an odd size": _said(lambda: compiled(*right[:3], _SIZE - 1, 1024)),
            "another constant": _said(lambda: compiled(*right[:4], 512)),
            "an argument too few": _said(lambda: compiled(*right[:4])),
            "another stream": _said(lambda: compiled(*right, stream=0)),
        }
        if not stage.is_amd:
            told |= _wrong_launchers(launch(4), lambda: compiled(*right))
            told["another architecture"] = _said(lambda: _load_elsewhere(stage, launch(4).asm["cubin"]))
    with (library := Library()):
        int(torch.zeros(1))
    told["a wait for the GPU"] = library.waits[0] if library.waits else ACCEPTED
    if stage.capability >= (9, 0) and not stage.is_amd:
        told |= _maps(stage)
    return told


def _said(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return str(error)
    return ACCEPTED


def _too_deep() -> None:
    """Eight stages of a large tile."""
    x, weight, y = (torch.empty(256, columns, dtype=torch.bfloat16) for columns in (512, 512, 256))
    s, b = torch.empty(256, 16, dtype=torch.bfloat16), torch.empty(256, 16)
    lora_forward(x, weight, None, s, b, y, plan=Plan(Tile(128, 256, 64, 16, warps=8, stages=8)))


def _wrong_launchers(compiled: Any, launch: Callable[[], object]) -> dict[str, str]:
    """What is said where Triton's own launcher did not do as it is told."""
    launcher, sound = compiled.run, compiled.run.unchecked

    def given(call: Sequence[Any], arguments: Sequence[Any]) -> None:
        old = arguments_of(call)
        sound(*call[:-1], tuple(arguments)) if old is call[-1] else sound(*call[: -len(old)], *arguments)

    def with_threads(call: Sequence[Any]) -> None:
        # the metadata is the first tuple, and the number of warps comes first in it
        i = next(i for i, each in enumerate(call) if isinstance(each, tuple))
        sound(*call[:i], (64, *call[i][1:]), *call[i + 1 :])

    def changed(change: Callable[[Any], Sequence[Any]]) -> Callable[..., None]:
        return lambda *call: given(call, change(arguments_of(call)))

    others: dict[str, Callable[..., None]] = {
        "pointers swapped": changed(lambda a: (a[1], a[0], *a[2:])),
        "another size": changed(lambda a: (*a[:3], a[3] - 16, *a[4:])),
        "another grid": lambda x, *rest: sound(x + 1, *rest),
        "too many threads": lambda *call: with_threads(call),
        "no launch": lambda *call: None,
    }
    told = {}
    for what, other in others.items():
        launcher.unchecked = other
        told[what] = _said(launch)
    launcher.unchecked = sound
    return told


def _load_elsewhere(stage: Stage, cubin: bytes) -> None:
    major, minor = stage.capability
    stage.library.stand_in_card(major, minor + 1, *stage.card[1:])
    try:
        if stage.library.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), cubin):
            raise RuntimeError(stage.driver_error())
    finally:
        stage.library.stand_in_card(major, minor, *stage.card[1:])


def _maps(stage: Stage) -> dict[str, str]:
    """What is said of tensor maps of bf16 ``[256, 512]``."""
    space = (ctypes.c_char * 256)()
    place = ctypes.c_void_p((ctypes.addressof(space) + 127) & ~127)

    def encode(*, address: int = 4096, inner: int = 64, rows: int = 128, stride: int = 1024) -> None:
        sizes, strides = (ctypes.c_uint64 * 2)(512, 256), (ctypes.c_uint64 * 1)(stride)
        box, steps = (ctypes.c_uint32 * 2)(inner, rows), (ctypes.c_uint32 * 2)(1, 1)
        bf16, swizzled_by_128 = 9, 3
        arguments = (bf16, 2, ctypes.c_void_p(address), sizes, strides, box, steps, 0, swizzled_by_128, 2, 0)
        if stage.library.cuTensorMapEncodeTiled(place, *arguments):
            raise RuntimeError(stage.driver_error())

    return {
        "a sound map": _said(encode),
        "a map's address": _said(lambda: encode(address=4104)),
        "a map's stride": _said(lambda: encode(stride=1032)),
        "a map's box": _said(lambda: encode(rows=300)),
        "a map's inner box": _said(lambda: encode(inner=128)),
        "a map's rows overlapping": _said(lambda: encode(stride=512)),
    }
