"""The file of measured choices: one for each GPU in the user's cache folder, written whole or not at all."""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from fastlora._core import backend
from fastlora._core.files import read_json, write_report
from fastlora._version import __version__
from fastlora_kernels import targets
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.quantised import Stored
from fastlora_kernels.choose.tuned import AnyRecord, Choice, Record, SharedRecord, Winners
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, Tile

_SCHEMA = 1
_ADVICE = "delete it, or run fastlora tune again"


class _Unfit(ValueError):
    """A sound file that is not for here."""


@functools.cache
def gpu_of(device: torch.device) -> str:
    """The name under which a device's records go; its file is read once, so that nothing changes later."""
    if device.type != "cuda":
        return device.type
    gpu = gpu_key(device)
    if gpu not in tuned.gpus():
        tuned.pin(gpu, read_or_warn(gpu, targets.detect(device)))
    return gpu


def gpu_key(device: torch.device) -> str:
    """The GPU's name and size, whatever the driver: ``nvidia-h100-80gb-hbm3-132``."""
    properties = torch.cuda.get_device_properties(device)
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    return f"{name}-{properties.multi_processor_count}"


def path_of(gpu: str) -> Path:
    """Where the choices for a GPU are kept."""
    return backend.cache_folder() / f"tuned-{gpu}.json"


def write(path: Path, gpu: str, records: Iterable[AnyRecord]) -> None:
    """Replace the file in one step.

    Raises:
        OSError: The folder can't be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"records": [], "shared": []}
    for record in records:
        content["shared" if isinstance(record, SharedRecord) else "records"].append(asdict(record))
    write_report(path, _made_by(gpu) | content)


def read(path: Path, gpu: str) -> list[AnyRecord]:
    """The records of a file, those of layers that share their input last.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or was made by another version or for another GPU.
    """
    try:
        content = read_json(path)
        for name, value in _made_by(gpu).items():
            if content[name] != value:
                raise _Unfit(f"expected {name} {value} in {path}, got {content[name]}; {_ADVICE}")
        # absent from files of before they were measured
        together = content.get("shared", ())
        return [*map(_record, content["records"]), *map(_shared_record, together)]
    except _Unfit:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected measured choices in {path}, got a damaged file ({error!r}); {_ADVICE}"
        ) from error


def read_or_warn(gpu: str, target: Target) -> list[AnyRecord]:
    """The records for a GPU; with a warning, without those that can't be used."""
    path = path_of(gpu)
    try:
        records = read(path, gpu)
        fitting = [record for record in records if tuned.fits(record, target)]
        if len(fitting) < len(records):
            raise _Unfit(
                f"{len(records) - len(fitting)} of {len(records)} choices in {path} name paths or tiles that "
                f"the plans for {target.name} don't have; {_ADVICE}"
            )
        return fitting
    except FileNotFoundError:
        return []
    # a file that was edited by hand may hold anything
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"choices are predicted instead of measured: {error}", stacklevel=2)
        return []


def keep(record: AnyRecord, gpu: str) -> None:
    """Put a record into this GPU's file, in the place of an earlier one of the same call, and use it.

    Args:
        record: What was measured.
        gpu: The GPU's name, of :func:`gpu_key`.

    Raises:
        OSError: The file can't be written.
    """
    path, before = path_of(gpu), []
    # a damaged file, or one of another version, is replaced
    with contextlib.suppress(OSError, ValueError):
        before = read(path, gpu)
    records = [*(each for each in before if _call(each) != _call(record)), record]
    write(path, gpu, records)
    tuned.pin(gpu, records)


def _call(record: AnyRecord) -> tuple[object, ...]:
    if isinstance(record, SharedRecord):
        return record.shapes, record.dtype, record.dropping
    return record.shape, record.dtype, record.dropping, record.weight


def _made_by(gpu: str) -> dict[str, Any]:
    """What has to be the same for records to be of use: another Triton makes other code of a kernel."""
    # not the distribution's version: nightlies and vendors' images call it by other names
    import triton

    return {"schema": _SCHEMA, "fastlora": __version__, "triton": triton.__version__, "gpu": gpu}


def _record(values: Mapping[str, Any]) -> Record:
    own = {name: values[name] for name in ("dtype", "dropping")}
    # absent from files of before they were measured
    other, weight = values.get("from_host"), values.get("weight")
    if weight is not None and weight not in get_args(Stored):
        raise ValueError(f"a weight that is stored as {weight!r}")
    return Record(
        shape=_shape(values["shape"]),
        **own,
        **_won(values),
        from_host=None if other is None else Winners(**_won(other)),
        weight=weight,
    )


def _shared_record(values: Mapping[str, Any]) -> SharedRecord:
    return SharedRecord(
        shapes=tuple(_shape(shape) for shape in values["shapes"]),
        in_graph=_choice(values["in_graph"]),
        from_host=_choice(values["from_host"]),
        **{name: values[name] for name in ("dtype", "dropping", "microseconds")},
    )


def _shape(values: Mapping[str, Any]) -> Shape:
    sizes = [values[name] for name in ("m", "n", "k", "r")]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"sizes that are not whole numbers of at least 1: {dict(values)!r}")
    return Shape(**values)


def _won(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "forward": _choice(values["forward"]),
        "backward": _choice(values["backward"]),
        "microseconds": values["microseconds"],
    }


def _choice(values: Mapping[str, Any]) -> Choice:
    tile = values["tile"]
    return Choice(values["path"], None if tile is None else Tile(**tile))
