"""Every kind of picture file looks the same to training, prediction and the report."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fastlora.transfer.data import (
    as_picture,
    find_corrupt,
    open_images,
    open_picture,
    pretrained_transforms,
    readable,
)

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))


def sixteen(order: str) -> Image.Image:
    return Image.fromarray(RAMP.astype(f"{order}u2") * 257)


GREY = {
    "I;16.png": sixteen("<"),
    "I;16.tif": sixteen("<"),
    "I;16B.tif": sixteen(">"),
    "I-of-16.tif": Image.fromarray(RAMP.astype(np.int32) * 257),
    "I-of-8.tif": Image.fromarray(RAMP.astype(np.int32)),
    "I-of-32.tif": Image.fromarray((RAMP.astype(np.int64) * 8_000_000 - 2**30).astype(np.int32)),
    "F-of-1.tif": Image.fromarray(RAMP.astype(np.float32) / 255),
    "F-of-255.tif": Image.fromarray(RAMP.astype(np.float32)),
    "F-of-any.tif": Image.fromarray(RAMP.astype(np.float32) * 40 - 1234),
    "CMYK.tif": Image.fromarray(RAMP).convert("CMYK"),
    "P.png": Image.fromarray(RAMP).convert("P"),
    "P.gif": Image.fromarray(RAMP),
    "L.pgm": Image.fromarray(RAMP),
    "LAB.tif": Image.frombytes(
        "LAB", (64, 64), np.stack([RAMP, np.zeros_like(RAMP), np.zeros_like(RAMP)], axis=2).tobytes()
    ),
}


@pytest.mark.parametrize("name", GREY)
def test_grey_of_every_depth_keeps_its_levels(name: str, tmp_path: Path) -> None:
    GREY[name].save(tmp_path / name)
    seen = open_picture(tmp_path / name)
    assert (seen.mode, seen.size) == ("RGB", (64, 64))
    error = np.abs(np.asarray(seen).astype(int) - RAMP[:, :, None])
    # lightness is no linear scale of grey
    assert error.max() <= (25 if name.startswith("LAB") else 1)


def test_numbers_that_are_none_are_black() -> None:
    values = RAMP.astype(np.float32) / 255
    values[0, :3] = np.nan, np.inf, -np.inf
    assert np.asarray(as_picture(Image.fromarray(values)))[0, :3, 0].tolist() == [0, 255, 0]
    assert np.asarray(as_picture(np.full((2, 2), np.nan))).max() == 0
    assert np.asarray(as_picture(np.full((2, 2), 300.0))).max() == 0


def coloured_16() -> bytes:
    """A PNG of 16-bit RGB, which Pillow doesn't write."""
    rows = b"".join(b"\0" + np.repeat(row.astype(">u2") * 257, 3).tobytes() for row in RAMP)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_colour_of_16_bits() -> None:
    assert np.array_equal(np.asarray(as_picture(coloured_16()))[..., 2], RAMP)


def transparent(mode: str) -> Image.Image:
    """Red or grey under a transparent left half."""
    picture = Image.new("RGBA", (8, 8), (200, 30, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 8))
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 200, 30, 30])
        palette.paste(0, (0, 0, 4, 8))
        palette.info["transparency"] = 0
        return palette
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "webp")]
)
def test_transparent_is_white(mode: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    how: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    transparent(mode).save(path, **how)
    seen = open_picture(path)
    assert seen.getpixel((1, 1)) == (255, 255, 255)
    assert seen.getpixel((6, 6)) != (255, 255, 255)


def test_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    sixteen("<").save(tmp_path / "x.png", transparency=0)
    seen = np.asarray(open_picture(tmp_path / "x.png"))
    assert seen[0, 0].tolist() == [255] * 3
    assert seen[0, 32].tolist() == [RAMP[0, 32]] * 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_upright_as_exif_says(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP[:32]).convert("RGB").save(tmp_path / f"x.{suffix}", exif=exif)
    seen = open_picture(tmp_path / f"x.{suffix}")
    assert seen.size == (32, 64)
    column = np.asarray(seen)[:, 16, 0].astype(int)
    assert column[60] > column[32] > column[4]


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_of_several_frames(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    red, _, blue = np.asarray(open_picture(tmp_path / f"x.{suffix}"))[4, 4].tolist()
    assert red > 200 > 50 > blue


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.new("1", (30, 40)).save(tmp_path / folder / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    # Pillow warns itself from here, and refuses at twice as many
    with pytest.warns(Image.DecompressionBombWarning):
        found = find_corrupt(open_images(tmp_path))
    assert "at most 1,199 pixels, got 30 x 40" in found[0]


def test_strips_are_not_blown_up() -> None:
    evaluate = pretrained_transforms("resnet18", image_size=32)[1]
    with Image.new("RGB", (1, 2_000_000), "red") as strip:
        # 37 times 74,000,000 pixels otherwise
        assert evaluate(strip).shape == (3, 32, 32)
    assert evaluate(Image.fromarray(RAMP)).shape == (3, 32, 32)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    damaged = {"empty": b"", "cut": whole.getvalue()[:1000], "text": b"hello"}
    for name, content in damaged.items():
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{name}.png").write_bytes(content)
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b").mkdir()
    Image.fromarray(RAMP).save(tmp_path / "b" / "x.png")
    images = open_images(tmp_path)
    assert set(find_corrupt(images)) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"4 of 5 pictures .* leaves no picture of a"):
        readable(images, on_corrupt="skip")


def test_what_data_sets_hold() -> None:
    content = io.BytesIO()
    Image.fromarray(RAMP).save(content, "PNG")
    grey = (
        RAMP,
        RAMP[:, :, None],
        RAMP.astype(np.uint16) * 257,
        RAMP / 255,
        RAMP.astype(np.int64),
        content.getvalue(),
        {"bytes": content.getvalue(), "path": None},
        sixteen("<"),
    )
    for item in grey:
        seen = as_picture(item)
        assert isinstance(seen, Image.Image)
        assert np.array_equal(np.asarray(seen)[..., 1], RAMP)
    assert np.asarray(as_picture(np.eye(4, dtype=bool))).max() == 255
    whole = torch.tensor(RAMP[None].astype(np.int64))
    assert torch.equal(torch.as_tensor(as_picture(whole)), whole.to(torch.uint8))
    with pytest.raises(ValueError, match=r"1 to 4 channels, got \(3, 64, 64\)"):
        as_picture(np.zeros((3, 64, 64), np.uint8))
    halves = torch.rand(2, 3, 4, 4).to(torch.bfloat16)
    assert readable(open_images(TensorDataset(halves, torch.arange(2)))).digests is not None
    with pytest.raises(TypeError, match="got int"):
        as_picture(3)
    with pytest.raises(ValueError, match="expected pixels, got 0 x 3"):
        as_picture(Image.new("RGB", (0, 3)))
