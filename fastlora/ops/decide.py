"""Which path and tile a LoRA op takes on its GPU: what was measured there, else what is predicted."""

import functools

import torch

from fastlora._core import backend
from fastlora.ops import tuned_file
from fastlora_kernels import targets
from fastlora_kernels.choose import paths, tuned
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import Choice, Record
from fastlora_kernels.tile import Shape


def choose(
    part: Pass, shape: Shape, dtype: torch.dtype, device: torch.device, *, dropping: bool, dora: bool = False
) -> Choice:
    """Path and tile of one pass.

    Never the library's path where the kernels were asked for by name, or with dropout, whose mask the library
    would keep in another form.
    """
    record = None if dora else _measured(shape, dtype, device, dropping=dropping)
    choice = None if record is None else (record.forward if part == "forward" else record.backward)
    if choice is None or choice.path == tuned.REFERENCE:
        target = targets.detect(device)
        choice = Choice(paths.choose_path(part, shape, dtype, target, dropping=dropping, dora=dora))
    if choice.path == "library" and (dropping or not backend.is_automatic()):
        return Choice("split")
    return choice


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_kernels(n: int, k: int, r: int, aligned: bool, device: torch.device) -> bool:
    """Whether the kernels are meant for calls like this on its GPU, however many rows there are."""
    return paths.has_kernels(Shape(m=1, n=n, k=k, r=r, aligned=aligned), targets.detect(device))


def prefers_eager(shape: Shape, dtype: torch.dtype, device: torch.device, *, dropping: bool) -> bool:
    """Whether the eager formula was measured to be the fastest for this LoRA call."""
    record = _measured(shape, dtype, device, dropping=dropping)
    return record is not None and record.forward.path == tuned.REFERENCE


@functools.cache
def gpu_of(device: torch.device) -> str:
    """The name under which a device's records go; its file is read once, so that nothing changes later."""
    if device.type != "cuda":
        return device.type
    gpu = tuned_file.gpu_key(device)
    if gpu not in tuned.gpus():
        tuned.pin(gpu, tuned_file.read_or_warn(gpu, targets.detect(device)))
    return gpu


def _measured(shape: Shape, dtype: torch.dtype, device: torch.device, *, dropping: bool) -> Record | None:
    return tuned.find(gpu_of(device), shape, dtype, dropping=dropping)
