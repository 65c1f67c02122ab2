"""The two files of an adapter folder, read without running anything and written without a half-way state."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastlora._core.files import aside, read_json, settle, write_through
from fastlora.state.own_config import FileConfig, parse_file_config
from fastlora.state.sound import check_sound

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# earlier versions wrote one name alone of what several modules share
_TIED, _EVERY_NAME = "tied", "under every name"


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder holds.

    Attributes:
        folder: Where it is.
        tensors: By their names in the file.
        config: What they are.
        every_name: Whether what several modules shared and trained as one is there under all of their names.
    """

    folder: Path
    tensors: dict[str, Tensor]
    config: FileConfig
    every_name: bool = True


def read_adapter(folder: Path) -> AdapterFile:
    """Tensors and settings of an adapter folder; never unpickles.

    Raises:
        FileNotFoundError: No such folder, or a file is missing in it.
        NotADirectoryError: ``folder`` is a file.
        ValueError: A pickle instead of safetensors, a damaged file, or an unsupported config.
    """
    if not folder.exists():
        raise FileNotFoundError(f"expected an adapter folder, found nothing at {folder}; check the path")
    if not folder.is_dir():
        raise NotADirectoryError(
            f"expected an adapter folder, got the file {folder}; give the folder it is in"
        )
    if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
        raise ValueError(
            f"expected {TENSORS} in {folder}, got {PICKLE}, a pickle, which can run code when it is opened; "
            "save it again with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            # PEFT gives adapters that are not called "default" a folder of their own inside
            inner = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))
            advice = f"did you mean {inner[0]}?" if inner else "save it again"
            raise FileNotFoundError(f"expected {CONFIG} and {TENSORS} in {folder}, found no {name}; {advice}")
    raw = read_json(folder / CONFIG)
    try:
        config = parse_file_config(raw)
    # a field of another type than it has anywhere
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        # bytes, not a memory map: the file may be replaced while we hold its tensors
        content = (folder / TENSORS).read_bytes()
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(
            f"expected a safetensors file, got {folder / TENSORS}, which is truncated or something else "
            f"({error}); copy or save it again"
        ) from error
    check_sound(tensors, folder / TENSORS)
    metadata = _header(content)[0].get("__metadata__") or {}
    every_name = config.by_peft or metadata.get(_TIED) == _EVERY_NAME
    return AdapterFile(folder, tensors, config, every_name)


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write both files, or leave the folder's older adapter as it was.

    Everything is on disk under other names before the first file is replaced. The config comes last, and an
    older, different config is taken away first, so that a crash in between leaves no mixture that loads.

    Raises:
        NotADirectoryError: ``folder`` is a file or lies under one.
        PermissionError: It can't be written to.
    """
    payload = _marked(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    text = (json.dumps(config, indent=2) + "\n").encode()
    with _clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with aside(folder / TENSORS) as new_tensors, aside(folder / CONFIG) as new_config:
            write_through(new_tensors, payload)
            write_through(new_config, text)
            old = folder / CONFIG
            if old.exists() and old.read_bytes() != text:
                old.unlink()
            new_tensors.replace(folder / TENSORS)
            new_config.replace(old)
    settle(folder)


def _header(content: bytes) -> tuple[dict[str, Any], int]:
    """The JSON at the beginning of a safetensors file, and where the tensors begin."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), end


def _marked(content: bytes) -> bytes:
    """A safetensors file that says of what is tied that it is there under every name."""
    header, end = _header(content)
    # the library writes several texts in an order that changes, and equal adapters shall be equal files
    header["__metadata__"][_TIED] = _EVERY_NAME
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


@contextlib.contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"expected a folder to write the adapter into, got {folder}, which is a file or lies under one; "
            "give another path"
        ) from error
    except PermissionError as error:
        raise PermissionError(
            f"expected a folder that can be written to, got {folder} ({error.strerror}); "
            "give another path or change its permissions"
        ) from error
