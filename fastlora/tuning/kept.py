"""Measured choices join the file of their GPU, and the running process."""

import contextlib

from fastlora.ops import tuned_file
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Record


def keep(record: Record, gpu: str) -> None:
    """Put a record into this GPU's file, in the place of an earlier one of the same call, and use it.

    Args:
        record: What was measured.
        gpu: As :func:`fastlora.ops.tuned_file.gpu_key` names it.

    Raises:
        OSError: The file can't be written.
    """
    path, before = tuned_file.path_of(gpu), []
    # a damaged file, or one of another version, is replaced
    with contextlib.suppress(OSError, ValueError):
        before = tuned_file.read(path, gpu)
    records = [*(each for each in before if _call(each) != _call(record)), record]
    tuned_file.write(path, gpu, records)
    tuned.pin(gpu, records)


def _call(record: Record) -> tuple[object, ...]:
    return record.shape, record.dtype, record.dropping
