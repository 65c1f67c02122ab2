"""The file of measured choices: one for each GPU in the user's cache folder, written whole or not at all."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlora._core import backend
from fastlora._core.files import read_json, write_report
from fastlora._version import __version__

if TYPE_CHECKING:
    from fastlora_kernels.choose.tuned import Record
    from fastlora_kernels.targets import Target

_SCHEMA = 1
_ADVICE = "delete it, or run fastlora tune again"


class _Unfit(ValueError):
    """A sound file that is not for here."""


def gpu_key(device: torch.device) -> str:
    """The GPU's name and size, whatever the driver: ``nvidia-h100-80gb-hbm3-132``."""
    properties = torch.cuda.get_device_properties(device)
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    return f"{name}-{properties.multi_processor_count}"


def path_of(gpu: str) -> Path:
    """Where the choices for a GPU are kept."""
    return backend.cache_folder() / f"tuned-{gpu}.json"


def write(path: Path, gpu: str, records: "Iterable[Record]") -> None:
    """Replace the file in one step.

    Raises:
        OSError: The folder can't be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, _made_by(gpu) | {"records": [asdict(record) for record in records]})


def read(path: Path, gpu: str) -> "list[Record]":
    """The records of a file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or was made by another version or for another GPU.
    """
    try:
        content = read_json(path)
        for name, value in _made_by(gpu).items():
            if content[name] != value:
                raise _Unfit(f"expected {name} {value} in {path}, got {content[name]}; {_ADVICE}")
        return [_record(values) for values in content["records"]]
    except _Unfit:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected measured choices in {path}, got a damaged file ({error!r}); {_ADVICE}"
        ) from error


def read_or_warn(gpu: str, target: "Target") -> "list[Record]":
    """The records for a GPU; with a warning, without those that can't be used."""
    from fastlora_kernels.choose import tuned

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


def _made_by(gpu: str) -> dict[str, Any]:
    """What has to be the same for records to be of use: another Triton makes other code of a kernel."""
    # not the distribution's version: nightlies and vendors' images call it by other names
    import triton

    return {"schema": _SCHEMA, "fastlora": __version__, "triton": triton.__version__, "gpu": gpu}


def _record(values: Mapping[str, Any]) -> "Record":
    from fastlora_kernels.choose.tuned import Choice, Record
    from fastlora_kernels.tile import Shape, Tile

    def choice(part: str) -> Choice:
        tile = values[part]["tile"]
        return Choice(values[part]["path"], None if tile is None else Tile(**tile))

    own = {name: values[name] for name in ("dtype", "dropping", "microseconds")}
    return Record(
        shape=Shape(**values["shape"]), forward=choice("forward"), backward=choice("backward"), **own
    )
