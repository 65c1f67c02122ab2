"""One way from whatever holds a picture to eight-bit RGB: training, prediction and thumbnails see the same.

- The first frame of several, turned upright as EXIF says.
- Where a picture is transparent it shows white, as on paper.
- 16 bits are scaled by their full range, 0 to 65535.
- Other whole numbers and floats are scaled by the narrowest of the usual ranges that holds them (0 to 1 for
  floats, 0 to 255, 0 to 65535 for whole numbers), and by their own least and greatest if none does. What is
  not a number is black.
"""

import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

_WITH_ALPHA = ("RGBA", "RGBa", "LA", "PA", "P")
# their 16-bit grey pictures have been 32-bit integers in some versions of Pillow
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


def open_picture(path: str | Path) -> Image.Image:
    """The picture in a file, as eight-bit RGB.

    Args:
        path: File in any format that Pillow opens.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no pixels, or more than ``PIL.Image.MAX_IMAGE_PIXELS``; nothing was decoded.
        OSError: It is damaged or no picture; decoders of rare formats raise other errors too.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("LA", (8, 8)).save(folder / "grey.png")
        >>> open_picture(folder / "grey.png").mode
        'RGB'
    """
    with Image.open(path) as picture:
        return to_rgb(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """A copy in eight-bit RGB; see the module for what becomes of other kinds of pixels.

    Raises:
        ValueError: It has no pixels, or more than ``PIL.Image.MAX_IMAGE_PIXELS``.
        OSError: Its file is damaged.

    Example:
        >>> to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
        >>> to_rgb(Image.new("I;16", (1, 1), 32896)).getpixel((0, 0))
        (128, 128, 128)
    """
    _check_size(picture)
    upright = _upright(picture)
    if upright.mode[0] in "IF":
        return _scaled(upright, picture.format).convert("RGB")
    if upright.mode == "LAB":
        return _from_lab(upright)
    if upright.mode == "La":
        upright = upright.convert("LA")
    if upright.mode in _WITH_ALPHA or "transparency" in upright.info:
        coloured = upright.convert("RGBA")
        paper = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(paper, coloured).convert("RGB")
    return upright.convert("RGB")


def as_picture(item: Any) -> Image.Image | Tensor:
    """What an item of a data set shows: RGB, or a tensor that a transform takes.

    Args:
        item: A PIL picture, an array ``[H, W]`` or ``[H, W, C]``, a path, the bytes of a file, Hugging Face's
            ``{"bytes": ..., "path": ...}``, or a tensor ``[C, H, W]``: floats stay as they are, whole numbers
            become uint8.

    Raises:
        ValueError: An array of another shape, or a picture without pixels or with too many.
        TypeError: None of these.

    Example:
        >>> as_picture(Image.new("L", (8, 4))).size
        (8, 4)
    """
    if isinstance(item, Tensor):
        if item.dtype == torch.uint8 or item.is_floating_point():
            return item
        return torch.from_numpy(_eight_bits(item.numpy()))
    if isinstance(item, Image.Image):
        return to_rgb(item)
    if isinstance(item, str | Path):
        return open_picture(item)
    if isinstance(item, Mapping) and {"bytes", "path"} & item.keys():
        return as_picture(item.get("bytes") or item["path"])
    if isinstance(item, bytes):
        with Image.open(io.BytesIO(item)) as picture:
            return to_rgb(picture)
    if isinstance(item, list) or hasattr(item, "__array__"):
        return _from_array(np.asarray(item))
    raise TypeError(f"expected a picture, an array, a tensor, a path or bytes, got {type(item).__name__}")


def _check_size(picture: Image.Image) -> None:
    width, height = picture.size
    if not width * height:
        raise ValueError(f"expected pixels, got {width} x {height} of them")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"expected at most {limit:,} pixels, got {width} x {height} of them; shrink the picture, "
            "or raise PIL.Image.MAX_IMAGE_PIXELS if it can be trusted"
        )


def _upright(picture: Image.Image) -> Image.Image:
    # a damaged EXIF is no reason to refuse a picture; damaged pixels are met again when it is converted
    with suppress(Exception):
        if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(picture)
    return picture


def _scaled(picture: Image.Image, kind: str | None) -> Image.Image:
    """A grey picture of more than eight bits, as one of eight."""
    values = np.asarray(picture)
    if picture.mode != "F" and (picture.mode != "I" or kind in _SIXTEEN_BIT_FORMATS):
        values = values.astype(np.uint16)
    grey = _eight_bits(values)
    if "transparency" in picture.info:
        grey[values == picture.info["transparency"]] = 255
    return Image.fromarray(grey)


def _from_array(values: np.ndarray[Any, Any]) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (2, 3, 4))):
        raise ValueError(f"expected an array [H, W] or [H, W, C] of 1 to 4 channels, got {values.shape}")
    return to_rgb(Image.fromarray(_eight_bits(values)))


def _eight_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    numbers = values.astype(np.float64)
    low, high = _range(numbers[np.isfinite(numbers)], values.dtype)
    scaled = (numbers - low) * (255 / (high - low or 1))
    return np.nan_to_num(scaled, nan=0.0).clip(0, 255).round().astype(np.uint8)


def _range(numbers: np.ndarray[Any, Any], kind: np.dtype[Any]) -> tuple[float, float]:
    if kind == np.uint16:
        return 0.0, 65535.0
    if not numbers.size:
        return 0.0, 1.0
    low, high = float(numbers.min()), float(numbers.max())
    usual = (1.0, 255.0) if kind.kind == "f" else (255.0, 65535.0)
    held = next((top for top in usual if high <= top), None)
    return (low, high) if low < 0 or held is None else (0.0, held)


def _from_lab(picture: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted
