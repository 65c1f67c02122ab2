"""Files that are there whole or not at all, and JSON that is read without a traceback."""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# what a spreadsheet takes for the beginning of a formula
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
# Windows has no quotas of this name
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class NoRoomError(OSError):
    """A file didn't fit on its disk; the message says how much was missing and where."""


def no_room(error: OSError) -> bool:
    """Whether a disk or a quota is full."""
    return error.errno in _NO_ROOM


@contextlib.contextmanager
def aside(final: Path) -> Iterator[Path]:
    """A name for a file or folder in the making, beside its final one, so that moving it there is one step.

    What still has this name at the end is removed. ``tempfile`` would make files that only their owner reads.

    Args:
        final: Where it will be; the name in the making keeps its suffix.
    """
    path = final.with_name(f".{final.stem}.{uuid.uuid4().hex}.tmp{final.suffix}")
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if there is one; a crash in between leaves no half of it under its name."""
    if folder.exists():
        with aside(folder) as unseen:
            folder.replace(unseen)


def write_through(path: Path, content: bytes | memoryview) -> None:
    """Write a file that isn't there yet, and see it on the disk.

    Raises:
        OSError: There is one, or it can't be written.
    """
    with open(path, "xb") as file:
        file.write(content)
    sync(path)


def sync(path: Path) -> None:
    """See on the disk what a file holds, before it takes an older one's name.

    Raises:
        OSError: The disk didn't take it.
    """
    # some systems sync only what may be written to
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def settle(folder: Path) -> None:
    """See a folder's names on the disk: a rename outlives a power cut only then."""
    # not every system can open a folder
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step: readers see the old one or the whole new one, after a power cut too.

    Raises:
        NoRoomError: The disk is full; an older file is still there.
        OSError: It can't be written for another reason.
    """
    try:
        with aside(path) as new:
            write_through(new, content)
            new.replace(path)
    except OSError as error:
        if no_room(error):
            raise NoRoomError(error.errno, room_wanted(path, len(content), error)) from error
        raise
    settle(path.parent)


def room_wanted(path: Path, size: int, error: OSError) -> str:
    """What to say of a file of ``size`` bytes that doesn't fit."""
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    return (
        f"expected room for {size / 2**20:,.1f} MiB at {path}, {free / 2**20:,.1f} MiB are free "
        f"({error.strerror})"
    )


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write JSON in one step: readers see the old file or the whole new one."""
    write_file(path, (json.dumps(report, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What a JSON file holds; however it is damaged, that is a ``ValueError`` that names the file.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It can't be read.
        ValueError: It is a folder, or no JSON.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_report(folder / "a.json", {"rank": 4})
        >>> read_json(folder / "a.json")
        {'rank': 4}
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except IsADirectoryError as error:
        raise ValueError(f"expected JSON in {path}, got a folder") from error
    except RecursionError as error:
        raise ValueError(
            f"expected JSON in {path}, got something nested too deeply; the file is damaged"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {path}, got something else ({error}); the file is damaged"
        ) from error


def safe_cell(text: str) -> str:
    """A cell of a CSV file that no spreadsheet takes for a formula: an apostrophe goes before its beginning.

    As OWASP advises on CSV injection. Numbers stay numbers.

    Example:
        >>> safe_cell("=1+1"), safe_cell("-0.5"), safe_cell("cat")
        ("'=1+1", '-0.5', 'cat')
    """
    if not text.startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    # "\t1" is a number too, and no plain one
    return text if text == text.strip() else f"'{text}"


def check_file_place(path: Path) -> None:
    """See that a file can be written, before the work for it is done.

    Raises:
        IsADirectoryError: It is a folder.
        NotADirectoryError: Its folder is a file.
        FileNotFoundError: Its folder isn't there.
        PermissionError: Its folder can't be written to.
    """
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {path}; add a name (--output)")
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"expected a folder for {path.name}, found none at {folder}; make it first")
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder for {path.name}, got the file {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"expected a folder that can be written to for {path.name}, got {folder}")


def check_output_folder(folder: Path) -> None:
    """Make the folder and see that files can be written there, so that no run ends with nothing.

    Raises:
        NotADirectoryError: It is a file, or lies under one.
        PermissionError: It can't be made or written to.
    """
    advice = f"expected a folder to write to, got {folder}"
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{advice}, which is or lies under a file; choose another --output"
        ) from error
    except OSError as error:
        raise PermissionError(
            f"{advice}, which can't be written to ({error.strerror}); choose another --output"
        ) from error


def printable(text: str) -> str:
    """Text that any stream takes: bytes of a file's name that are no UTF-8 are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
