"""Lists of pictures and classes: a .csv file, read so that every mistake in it is told with its line."""

import codecs
import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastlora.transfer.data.files import Files, printable
from fastlora.transfer.data.images import LabelledImages

IMAGE_COLUMNS = ("path", "image", "file", "filename", "img", "image_path")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
_SEPARATORS = ",;\t"


def from_csv(path: Path, image_column: str | None, label_column: str | None) -> LabelledImages:
    """The pictures that a list names, with a class each.

    Raises:
        FileNotFoundError: A picture isn't there.
        ValueError: The text, its columns or one of its lines is not what a list has.
    """
    rows = _rows(path)
    header = next(rows, (1, []))[1]
    if not header:
        raise ValueError(f"expected a line with the names of its columns in {path}, got an empty file")
    image = find_column(image_column, IMAGE_COLUMNS, header, "image_column", path)
    label = find_column(label_column, LABEL_COLUMNS, header, "label_column", path)
    lines, names, labels = list[int](), list[str](), list[str]()
    for line, cells in rows:
        # spreadsheets may end a line with empty cells
        if any(cells[len(header) :]):
            raise ValueError(
                f"expected {len(header)} cells ({', '.join(header)}) in every line of {path}, "
                f"got {len(cells)} in line {line}; put a cell with a separator in it in quotes"
            )
        for column in (image, label):
            if not "".join(cells[column : column + 1]):
                raise ValueError(
                    f"expected a path and a class in every line of {path}, line {line} has no "
                    f"{header[column]}; fill it in or remove the line"
                )
        lines.append(line)
        names.append(cells[image])
        labels.append(cells[label])
    paths = [_located(path.parent, name) for name in names]
    missing = [place for place, found in enumerate(paths) if not os.path.isfile(found)]
    if missing:
        first = missing[0]
        raise FileNotFoundError(
            f"expected the {len(paths)} pictures that {path} names, {len(missing)} are not there, "
            f"{names[first]!r} first, in line {lines[first]}; paths are relative to the file's folder"
        )
    return LabelledImages.named([printable(name) for name in names], labels, Files(paths))


def find_column(
    given: str | None, usual: Sequence[str], columns: Sequence[str], option: str, where: object
) -> int:
    """The place of the column that is asked for, or that has a usual name; case doesn't matter.

    Raises:
        ValueError: There is none, or more than one of that name.
    """
    folded = [column.casefold() for column in columns]
    wanted = usual if given is None else [given.strip()]
    for name in wanted:
        if name in columns or name.casefold() in folded:
            found, among = (name, columns) if name in columns else (name.casefold(), folded)
            if list(among).count(found) > 1:
                raise ValueError(f"expected one column {name!r} in {where}, got {', '.join(columns)}")
            return list(among).index(found)
    raise ValueError(
        f"expected a column {' or '.join(map(repr, wanted))} in {where}, "
        f"got {', '.join(columns) or 'none'}; name it with {option}"
    )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of its line and the cells, of every row that isn't blank."""
    text = _text(path)
    separator = max(_SEPARATORS, key=text.lstrip().partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"expected rows of cells in {path}, line {reader.line_num}: {error}") from error


def _text(path: Path) -> str:
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"expected UTF-8 in {path}, line {line} has other bytes ({error.reason}); "
            "save the file as UTF-8, in a spreadsheet as 'CSV UTF-8'"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"expected text in {path}, line {line} has a zero byte; save the file as UTF-8")
    return text


def _located(folder: Path, name: str) -> Path:
    place = folder / os.path.expanduser(name)
    if "\\" in name and not os.path.isfile(place):
        # written on Windows
        return _located(folder, name.replace("\\", "/"))
    return place
