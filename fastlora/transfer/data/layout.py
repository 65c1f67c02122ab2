"""Data that come in parts: ``train/`` and ``val/`` in a folder, or a dictionary of splits."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.transfer.data.files import visible_folders

_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}


@dataclass(frozen=True)
class Layout:
    """The parts of a source.

    Attributes:
        train: Where the training pictures are.
        validation: Where those for validation are, or None.
        left_out: Names of what is neither, such as ``test``.
    """

    train: Any
    validation: Any
    left_out: tuple[str, ...]


def find_layout(source: Any) -> Layout | None:
    """The parts of a folder or a dictionary, or None if it is one set of pictures.

    A folder has parts if it holds ``train`` with class folders inside, and beside it nothing but other parts
    or a part with classes of the same names: a class may be called "train".

    Raises:
        ValueError: Two parts of one kind, parts without one to train on, or parts without class folders.
    """
    if isinstance(source, Mapping):
        return _layout({str(name): part for name, part in source.items()}, "the data")
    if not (isinstance(source, str | Path) and Path(source).is_dir()):
        return None
    folders = {folder.name: folder for folder in visible_folders(Path(source))}
    parts = {name: folder for name, folder in folders.items() if name.lower() in _KINDS}
    if not parts or (len(folders) == 1 and not visible_folders(*folders.values())):
        return None
    if len(parts) < len(folders) and not _share_classes(parts):
        return None
    if len(parts) == 1 and "train" not in map(_kind, parts):
        return None
    layout = _layout(folders, str(source))
    if not visible_folders(layout.train):
        raise ValueError(
            f"expected a folder for each class in {layout.train}, found none; sort the pictures into such "
            "folders, or list paths and classes in a .csv file"
        )
    return layout


def _layout(parts: Mapping[str, Any], where: str) -> Layout:
    chosen = {kind: _only(kind, parts, where) for kind in ("train", "validation")}
    if chosen["train"] is None:
        raise ValueError(
            f"expected a part to train on in {where}, got {', '.join(sorted(parts))}; name it train"
        )
    left_out = tuple(sorted(set(parts) - set(chosen.values())))
    validation = chosen["validation"]
    return Layout(parts[chosen["train"]], None if validation is None else parts[validation], left_out)


def _only(kind: str, names: Iterable[str], where: str) -> str | None:
    found = sorted(name for name in names if _kind(name) == kind)
    if len(found) > 1:
        raise ValueError(f"expected one part for {kind} in {where}, got {', '.join(found)}; keep one")
    return found[0] if found else None


def _kind(name: str) -> str | None:
    return _KINDS.get(name.lower())


def _share_classes(parts: Mapping[str, Path]) -> bool:
    inside = {_kind(name): {folder.name for folder in visible_folders(path)} for name, path in parts.items()}
    train = inside.pop("train", set())
    return any(train & others for others in inside.values())
