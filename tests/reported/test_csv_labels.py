"""Lists of pictures as spreadsheets, other systems and people write them."""

from pathlib import Path

import pytest
from PIL import Image

from fastlora.transfer.data import LabelledImages, open_images
from fastlora.transfer.data.order import natural

PLACES = ("cat/0.png", "cat/1.png", "dog/0.png")
ROWS = "".join(f"{place},{place[:3]}\n" for place in PLACES)
PLAIN = "path,label\n" + ROWS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shade, place in enumerate(PLACES):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), shade).save(tmp_path / place)
    return tmp_path


def opened(folder: Path, text: str | bytes, name: str = "x.csv") -> LabelledImages:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_images(folder / name)


SAME: dict[str, str | bytes] = {
    "as it should be": PLAIN,
    "byte order mark": "\ufeff" + PLAIN,
    "UTF-16 of a spreadsheet": PLAIN.encode("utf-16"),
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "no newline at the end": PLAIN.rstrip(),
    "blank lines": "\n" + PLAIN.replace("\n", "\n\n") + ",\n",
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "quotes": '"path","label"\n' + "".join(f'"{place}", "{place[:3]}"\n' for place in PLACES),
    "spaces": PLAIN.replace(",", " , "),
    "upper case": PLAIN.replace("path,label", "Path,LABEL"),
    "other columns": "id,label,path\n" + "".join(f"7,{place[:3]},{place}\n" for place in PLACES),
    "empty cells at the end": PLAIN.replace("\n", ",,\n"),
    "missing cells at the end": PLAIN.replace("label\n", "label,note\n"),
    "Windows": PLAIN.replace("/", "\\"),
}


@pytest.mark.parametrize("kind", SAME)
def test_all_say_the_same(kind: str, folder: Path) -> None:
    images = opened(folder, SAME[kind], "X.CSV")
    assert (images.classes, images.labels) == (("cat", "dog"), (0, 0, 1))
    assert [images[index][0].getpixel((0, 0))[0] for index in range(3)] == [0, 1, 2]


def test_paths_from_the_root_and_from_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    rows = f"~/cat/0.png,cat\n{folder}/cat/1.png,cat\n./dog/../dog/0.png,dog\n"
    assert opened(folder, "path,label\n" + rows).labels == (0, 0, 1)


WRONG: dict[str, tuple[str | bytes, str]] = {
    "short row": (PLAIN + "cat/0.png\n", "line 5 has no label"),
    "no class": (PLAIN + "\ncat/0.png,\n", "line 6 has no label"),
    "no path": (PLAIN + ",cat\n", "line 5 has no path"),
    "a separator too many": (PLAIN + "dog/0.png,dog,7\n", "got 3 in line 5"),
    "two columns of a name": (PLAIN.replace("path,label", "path,label,label"), "one column 'label'"),
    "Latin-1": (PLAIN.encode() + "cat/0.png,caf\xe9\n".encode("latin-1"), "line 5 has other bytes"),
    "zero byte": (PLAIN + "cat/\0.png,cat\n", "line 5 has a zero byte"),
    "endless cell": (PLAIN + "x" * 200_000 + ",cat\n", "line 5: field larger"),
    "nothing": ("", "got an empty file"),
    "header alone": ("path,label\n", "found none"),
    "no header": (ROWS, r"got cat/0.png, cat; name it with image_column"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_mistakes_are_told_with_their_line(kind: str, folder: Path) -> None:
    text, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        opened(folder, text)


def test_pictures_that_are_not_there(folder: Path) -> None:
    for name in ("gone.png", "cat", "C:\\\\cat\\\\0.png"):
        with pytest.raises(FileNotFoundError, match=r"4 pictures .* 1 are not there, .* in line 5"):
            opened(folder, PLAIN + f"{name},cat\n")


NAMES = ["1", "01", "001", "10", "9", "-2", "2.5", "b", "a10", "a9", "²", "9" * 5000, "", "1a", "x1y2"]


def test_class_names_have_one_order_however_they_come() -> None:
    wanted = sorted(NAMES, key=natural)
    assert wanted[:8] == ["-2", "001", "01", "1", "2.5", "9", "10", "9" * 5000]
    assert [name for name in wanted if name[:1] == "a"] == ["a9", "a10"]
    # whatever order a set has, which depends on the hash seed
    for turn in range(len(NAMES)):
        assert sorted(NAMES[turn:] + NAMES[:turn], key=natural) == wanted


def test_folders_and_lists_agree_on_the_order(folder: Path) -> None:
    names = ("10", "2", "9", "01", "1")
    for name in names:
        (folder / "numbers" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(folder / "numbers" / name / "0.png")
    rows = "".join(f"numbers/{name}/0.png,{name}\n" for name in names)
    listed = opened(folder, "path,label\n" + rows).classes
    assert listed == open_images(folder / "numbers").classes == ("01", "1", "2", "9", "10")
