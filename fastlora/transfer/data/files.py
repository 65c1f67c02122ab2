"""Picture files: which ones there are in a folder, and what is left out of it."""

import functools
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFile

from fastlora._core.log import logger
from fastlora.transfer.data.picture import open_picture
from fastlora.transfer.places import check_pictures

# videos and drawings that Pillow knows by name but needs another program for
_NOT_DECODED = ("MPEG", "EPS")
# made by archivers and file managers
_LITTER = ("__MACOSX",)


@dataclass(frozen=True)
class Files:
    """Reads pictures from paths, as RGB."""

    paths: list[Path]

    def __call__(self, index: int) -> Image.Image:
        """The picture at an index."""
        return open_picture(self.paths[index])


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes, in lower case with the dot, of the formats that this Pillow decodes.

    Example:
        >>> {".jpg", ".jfif", ".gif", ".webp"} <= picture_suffixes()
        True
    """
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if _is_decoded(kind))


def find_pictures(place: Path) -> list[Path]:
    """A picture itself, or all pictures in a folder and the folders inside.

    Raises:
        FileNotFoundError: There is nothing, or no pictures in it.
        PermissionError: A folder can't be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8)).save(folder / "one.png")
        >>> [path.name for path in find_pictures(folder)]
        ['one.png']
    """
    check_pictures(place)
    if place.is_file():
        return [place]
    paths, others = search(place)
    if not paths:
        raise FileNotFoundError(f"expected pictures in {place}, found {by_suffix(others) or 'none'}")
    tell_left_out(place, others)
    return paths


def search(folder: Path) -> tuple[list[Path], list[Path]]:
    """Pictures in a folder and the folders inside, links followed, and the files that are none.

    Hidden files and folders are in neither. A folder that links lead to more than once is searched once.

    Raises:
        PermissionError: A folder can't be read.
    """
    pictures, others, seen = list[Path](), list[Path](), set[str]()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        true_place = os.path.realpath(place)
        if true_place in seen:
            # or a link to a folder above would be followed for ever
            folders.clear()
            continue
        seen.add(true_place)
        folders[:] = sorted(name for name in folders if is_shown(name))
        for path in (Path(place, name) for name in names if is_shown(name)):
            (pictures if _looks_like_picture(path) else others).append(path)
    return sorted(pictures), sorted(others)


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder, without hidden ones."""
    return [entry for entry in folder.iterdir() if entry.is_dir() and is_shown(entry.name)]


def is_shown(name: str) -> bool:
    """Whether a file or folder of this name is meant to be seen."""
    return name[0] != "." and name not in _LITTER


def printable(name: str | Path) -> str:
    r"""A name for people: bytes that are no UTF-8 become escapes, since no page or log can hold them.

    Example:
        >>> printable("caf\udce9.png")
        'caf\\xe9.png'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def by_suffix(paths: Iterable[Path]) -> str:
    """How many files there are of each suffix, the most frequent first.

    Example:
        >>> by_suffix([Path("a.txt"), Path("b.HEIC"), Path("c.heic"), Path("README")])
        '.heic 2, .txt 1, without suffix 1'
    """
    counts = Counter(path.suffix.lower() or "without suffix" for path in paths)
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{printable(suffix)} {count}" for suffix, count in ordered)


def tell_left_out(folder: Path, paths: Iterable[Path], why: str = "not pictures that Pillow reads") -> None:
    """Log how many files of a folder are not used, by suffix."""
    if left_out := list(paths):
        files = "file" if len(left_out) == 1 else "files"
        logger.warning(
            "%d %s left out of %s: %s (%s)", len(left_out), files, folder, by_suffix(left_out), why
        )


def _is_decoded(kind: str) -> bool:
    Image.init()
    factory = Image.OPEN[kind][0] if kind in Image.OPEN else None
    is_stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    return factory is not None and not is_stub and kind not in _NOT_DECODED


def _looks_like_picture(path: Path) -> bool:
    # a link that leads nowhere is kept, to be refused by name; pipes and devices would block
    return path.suffix.lower() in picture_suffixes() and (path.is_file() or not path.exists())


def _refuse(error: OSError) -> None:
    raise error
