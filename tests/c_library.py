"""C sources of the tests as shared libraries, made once and kept."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def compile_c(sources: Sequence[Path], made: Path, *options: str) -> None:
    """Make a shared library with ``$CC``, or gcc.

    Args:
        sources: What is compiled.
        made: Where the library goes.
        options: Of the compiler.
    """
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-Wno-psabi", *map(str, sources)]
    subprocess.run([*command, "-o", str(made), *options], check=True)


def kept_library(sources: Sequence[Path], cache: Path, name: str, *options: str) -> Path:
    """The library of these sources, made unless it is there.

    Args:
        sources: All that it is made of; headers are not compiled.
        cache: Folder that keeps it, in one of its own.
        name: Of its file.
        options: Of the compiler.
    """
    made_of = [*(source.read_text("utf-8") for source in sources), *options]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:12]
    kept = cache / digest / name
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        # renamed into place: several processes may share the folder
        made = kept.with_suffix(f".{os.getpid()}")
        compile_c([source for source in sources if source.suffix == ".c"], made, *options)
        made.replace(kept)
    return kept
