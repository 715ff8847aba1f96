# SPDX-License-Identifier: Apache-2.0
"""Read an image file as 8-bit RGB."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""Formats of Pillow for pictures. Others are for icons, documents, films and measurements, or run programs (EPS)."""
_LEVELS = 255
_DEEP = 65535
"""Largest value of 8 and 16 bits."""


@dataclass(frozen=True)
class Pixels:
    """An image as it was read.

    Attributes:
        image: The image, RGB.
        scaled: How its values became 8 bits; empty if they were.
    """

    image: Image.Image
    scaled: str = ""


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB, rotated according to its EXIF orientation; see `read_pixels`."""
    return read_pixels(path).image


def read_pixels(path: Path) -> Pixels:
    """Read an image as RGB, rotated according to its EXIF orientation. Of several frames, the first is read.

    Transparency is dropped. Values of more than 8 bits are scaled to 0..255, where Pillow's own conversion would clip
    them: 16 bits by 1/257, floating point in 0..1 by 255.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: If it cannot be read as an image.
    """
    with open_image(path) as file:
        ImageOps.exif_transpose(file, in_place=True)  # In place, because it would copy images without an orientation.
        if file.mode == "F" or file.mode.startswith("I"):
            return _scaled(file, file.format)
        if file.mode == "P" and "transparency" in file.info:
            return Pixels(file.convert("RGBA").convert("RGB"))
        return Pixels(file.convert("RGB"))


def open_image(path: Path) -> ImageFile.ImageFile:
    """Open an image file in one of the `image_formats`, whatever its suffix.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: If it cannot be read as an image.
    """
    return Image.open(path, formats=image_formats())


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Return the formats of images that this build of Pillow reads, by their names there.

    HEIF is one of them where the package pillow-heif is installed. MPO is not: Pillow opens it as JPEG.
    """
    names = list(_FORMATS)
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        names.append("HEIF")
    Image.init()
    return tuple(name for name in names if name in Image.OPEN)


def _scaled(image: Image.Image, format_: str | None) -> Pixels:
    """Return a grey image of more than 8 bits as 8 bits."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("some of its values are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if low < 0 or high > _LEVELS:
            raise ValueError(f"its floating-point values are in {low:g}..{high:g}, neither in 0..1 nor in 0..255")
        if high > 1:
            return _grey(values, "floating-point values in 0..255 are rounded")
        return _grey(values * _LEVELS, "floating-point values in 0..1 are scaled to 0..255")
    if low < 0 or high > _DEEP:
        raise ValueError(f"its values are in {low:g}..{high:g}, not in 16 bits")
    if format_ == "TIFF" and image.mode == "I" and high <= _LEVELS:
        raise ValueError(f"its 32-bit values are in 0..{high:g}, which can be 8 or 16 bits: save it as one of them")
    return _grey(values / (_DEEP / _LEVELS), "16-bit values are scaled to 0..255")


def _grey(values: NDArray[np.generic], scaled: str) -> Pixels:
    grey = np.rint(values).astype(np.uint8)
    return Pixels(Image.fromarray(grey).convert("RGB"), scaled)
