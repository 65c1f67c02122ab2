"""Folders as they are downloaded, unpacked and copied: what is read of them, and what is told."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastlora.domain.pictures import open_target
from fastlora.transfer.data import (
    find_pictures,
    open_images,
    open_parts,
    readable,
    stratified_split,
    tell_copies,
    tell_overlap,
)


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def fill(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 2, first: int = 0) -> Path:
    for place, name in enumerate(classes):
        for number in range(count):
            draw(folder / name / f"{number}.png", first + 100 * place + number)
    return folder


def test_every_format_is_taken_and_the_rest_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    for suffix in ("gif", "jfif", "jpe", "JPG", "TIFF", "webp", "tga", "jp2"):
        draw(tmp_path / "cat" / f"x.{suffix}", 7)
    for name in ("notes.txt", "a.HEIC", "b.heic", "film.mpg", "table.h5", "._0.png", ".DS_Store"):
        (tmp_path / "cat" / name).write_bytes(b"something")
    draw(tmp_path / "cat" / ".thumbnails" / "0.png", 8)
    draw(tmp_path / "__MACOSX" / "cat" / "0.png", 8)
    draw(tmp_path / "loose.png", 8)
    images = open_images(tmp_path)
    assert (images.classes, len(images)) == (("cat", "dog"), 12)
    assert "5 files left out" in caplog.text
    assert ".heic 2, .h5 1, .mpg 1, .txt 1" in caplog.text
    assert "1 file left out" in caplog.text
    assert ".png 1 (outside of the class folders)" in caplog.text


def test_a_class_without_a_picture_that_can_be_read(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "0.heic").write_bytes(b"something")
    with pytest.raises(ValueError, match=r"found none in emu \(\.heic 1\)"):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found \.heic 1"):
        find_pictures(tmp_path / "emu")


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "valid"), ("train", "validation", "eval")]
)
def test_parts_are_no_classes(
    names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place, name in enumerate(names):
        fill(tmp_path / name, count=3 - place, first=10 * place)
    train, validation = open_parts(tmp_path)
    assert validation is not None
    assert train.classes == validation.classes == ("cat", "dog")
    assert (len(train), len(validation)) == (6, 4)
    assert ("left out of the data: " + names[-1] in caplog.text) == (len(names) > 2)
    assert open_images(tmp_path).names == train.names
    assert "only the part to train on" in caplog.text


def test_a_part_to_train_on_alone(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    assert open_parts(tmp_path)[0].classes == ("cat", "dog")
    assert open_parts(tmp_path)[1] is None
    fill(tmp_path / "labels", ("x",))
    # now train may well be a class
    assert open_images(tmp_path).classes == ("labels", "train")
    fill(tmp_path / "test")
    train, validation = open_parts(tmp_path)
    assert (train.classes, validation) == (("cat", "dog"), None)


def test_classes_may_be_called_like_parts(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "0.png", 0)
    draw(tmp_path / "bus" / "0.png", 1)
    assert open_images(tmp_path).classes == ("bus", "train")


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "train")
    fill(tmp_path / "a" / "val", ("cat", "emu"))
    with pytest.raises(ValueError, match="only one of them has dog, emu"):
        open_parts(tmp_path / "a")
    draw(tmp_path / "b" / "train" / "0.png", 0)
    draw(tmp_path / "b" / "val" / "0.png", 0)
    with pytest.raises(ValueError, match=r"a folder for each class in .*train, found none"):
        open_images(tmp_path / "b")
    fill(tmp_path / "c" / "val")
    fill(tmp_path / "c" / "test")
    with pytest.raises(ValueError, match=r"a part to train on in .*c, got test, val"):
        open_images(tmp_path / "c")
    fill(tmp_path / "a" / "valid")
    with pytest.raises(ValueError, match=r"one part for validation in .*, got val, valid"):
        open_images(tmp_path / "a")


def test_splits_in_a_dictionary(tmp_path: Path) -> None:
    images = open_images(fill(tmp_path))
    splits = {"train": images, "validation": images.subset([0, 2]), "test": images}
    train, validation = open_parts(splits)
    assert (len(train), len(validation or ())) == (4, 2)
    assert open_images(splits) is images


def test_links(tmp_path: Path) -> None:
    data = fill(tmp_path / "data")
    elsewhere = fill(tmp_path / "elsewhere", ("more",))
    (data / "cat" / "loop").symlink_to(data, target_is_directory=True)
    (data / "cat" / "linked").symlink_to(elsewhere / "more", target_is_directory=True)
    (data / "dog" / "again").symlink_to(elsewhere / "more", target_is_directory=True)
    images = open_images(data)
    assert "cat/linked/0.png" in images.names
    assert "dog/again/1.png" in images.names
    assert max(name.count("/") for name in images.names) == 3
    assert len(find_pictures(data)) == 6


def test_a_folder_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    inner = fill(tmp_path / "cat", ("inner",)) / "inner"
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == inner:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="inner"):
        find_pictures(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    fill(tmp_path)
    strange = os.fsdecode(b"caf\xe9")
    try:
        draw(tmp_path / strange / f"{strange}.png", 9)
    except OSError:
        pytest.skip("this file system has no such names")
    images = open_images(tmp_path)
    assert images.classes == ("caf\\xe9", "cat", "dog")
    images.names[0].encode()
    assert images[0][0].size == (4, 4)


def test_what_is_no_folder_of_classes(tmp_path: Path) -> None:
    path = draw(tmp_path / "0.png", 0)
    with pytest.raises(ValueError, match="got the file"):
        open_images(path)
    with pytest.raises(ValueError, match="found none in"):
        open_images(tmp_path)
    draw(tmp_path / "cat" / "0.png", 0)
    with pytest.raises(ValueError, match=r"two classes or more .* got 1 \(cat\)"):
        open_images(tmp_path)


def test_a_target_with_parts_or_hidden_folders(tmp_path: Path) -> None:
    source = open_images(fill(tmp_path / "source"))
    target = tmp_path / "target"
    draw(target / "0.png", 0)
    (target / ".cache").mkdir()
    (target / "__MACOSX").mkdir()
    assert not open_target(source, target)[1]
    fill(tmp_path / "parts" / "train")
    fill(tmp_path / "parts" / "val")
    assert open_target(source, tmp_path / "parts")[1]


def test_copies_stay_on_one_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, count=6)
    for number in range(6):
        # the same pixels under another name, in another format
        draw(tmp_path / "cat" / f"copy{number}.bmp", number)
    images = readable(open_images(tmp_path))
    tell_copies(images)
    assert "6 of 18 pictures are duplicates" in caplog.text
    for seed in range(5):
        parts = stratified_split(images.labels, [0.6, 0.4], seed=seed, groups=images.digests)
        train, held_out = (images.subset(part) for part in parts)
        assert not {*(train.digests or ())} & {*(held_out.digests or ())}
        assert (len(train), len(held_out)) == (12, 6)
        caplog.clear()
        tell_overlap(train, held_out, "validation")
        assert not caplog.text
    tell_overlap(images, held_out, "testing")
    assert "6 of 6 pictures for testing are duplicates of training pictures" in caplog.text


def test_one_picture_with_two_classes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    draw(tmp_path / "dog" / "same.png", 0)
    tell_copies(readable(open_images(tmp_path)))
    assert "more than one class: cat/0.png (cat) = dog/same.png (dog)" in caplog.text


def test_too_few_different_pictures_of_a_class() -> None:
    with pytest.raises(ValueError, match="copies not counted, got 1 of class 'dog'"):
        stratified_split([0, 0, 1, 1], [0.5, 0.5], seed=0, groups="abcc", classes=("cat", "dog"))


def test_nothing_is_told_of_tidy_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tell_copies(readable(open_images(fill(tmp_path))))
    assert not caplog.text
