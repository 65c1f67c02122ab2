"""One run in a folder at a time."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlora._core.backend import launched_rank

LOCK = ".lock"
_held: set[int] = set()


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder inside a ``with`` block.

    The operating system takes the lock away with the process, so that none is left behind by a crash. Of
    several processes of one run the first one holds it. On file systems without locks nothing is kept out.

    Args:
        folder: Exists, and can be written to.

    Raises:
        ValueError: Another run has it.
    """
    if launched_rank() != 0:
        yield
        return
    owner, path = os.getpid(), folder / LOCK
    descriptor = _taken(path)
    _held.add(descriptor)
    try:
        os.write(descriptor, str(owner).encode())
        yield
    finally:
        # a child of a fork has closed its copy already
        if os.getpid() == owner:
            _held.discard(descriptor)
            # while it is still ours: whoever waits for the name finds that its file is gone
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _taken(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor):
            holder = os.read(descriptor, 32).decode(errors="replace")
            os.close(descriptor)
            raise ValueError(
                f"expected a folder that no other run writes to, {path.parent} is in use by process "
                f"{holder or 'unknown'}; wait for its end, or choose another folder (--output)"
            )
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            return descriptor
        # the run before has removed the file since it was opened
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # a file system without locks
        return True
    return True


def _leave_in_child() -> None:
    # a process that loads pictures may outlive a killed run, and must not keep its lock
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_in_child)
