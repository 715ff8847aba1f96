"""Images of more or fewer than 8 bits, and of other colours than RGB."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import to_tensor

from taoq.tasks.images import ImageBatches
from taoq.tasks.pixels import read_image, read_pixels

PHOTOGRAPH = Image.fromarray(load_sample_image("flower.jpg")).convert("L").resize((64, 48))
GREY = np.asarray(PHOTOGRAPH)


def grey(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    channels = np.asarray(image)
    assert (channels == channels[..., :1]).all()
    return channels[..., 0]


@pytest.mark.parametrize(
    ("name", "values", "scaled"),
    [
        ("16.png", GREY.astype(np.uint16) * 257, "16-bit values are scaled to 0..255"),
        ("16.tif", GREY.astype(np.uint16) * 257, "16-bit values are scaled to 0..255"),
        ("32.tif", GREY.astype(np.int32) * 257, "16-bit values are scaled to 0..255"),
        ("1.tif", GREY.astype(np.float32) / 255, "floating-point values in 0..1 are scaled to 0..255"),
        ("255.tif", GREY.astype(np.float32), "floating-point values in 0..255 are rounded"),
    ],
)
def test_values_of_more_bits_are_scaled(name: str, values: np.ndarray, scaled: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(grey(tmp_path / name), GREY)
    assert read_pixels(tmp_path / name).scaled == scaled


def test_a_big_endian_file_is_read(tmp_path: Path) -> None:
    """TIFF files of many cameras; Pillow reads them in the mode I;16B."""
    words = (GREY.astype(np.uint16) * 257).astype(">u2")
    Image.frombytes("I;16B", PHOTOGRAPH.size, words.tobytes()).save(tmp_path / "big.tif")
    assert np.array_equal(grey(tmp_path / "big.tif"), GREY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREY.astype(np.float32) - 128, r"its floating-point values are in -\d+..\d+, neither in 0..1 nor in 0..255"),
        (np.full((2, 2), np.nan, np.float32), "some of its values are NaN or infinite"),
        (GREY.astype(np.int32) * 70000, r"its values are in 0..[\d.e+]+, not in 16 bits"),
        (GREY.astype(np.int32), r"its 32-bit values are in 0..\d+, which can be 8 or 16 bits: save it as one of them"),
    ],
)
def test_values_of_unknown_meaning_are_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    values.flat[0] = min(values.flat[0], 0) if np.isfinite(values).all() else values.flat[0]
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"^{message}$"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", ".png"),
        ("L", ".png"),
        ("LA", ".png"),
        ("P", ".png"),
        ("RGBA", ".png"),
        ("CMYK", ".tif"),
        ("YCbCr", ".tif"),
    ],
)
def test_other_colours_keep_their_brightness(mode: str, suffix: str, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 255).convert("RGB" if mode not in ("1", "LA") else "L").convert(mode).save(
        tmp_path / f"x{suffix}"
    )
    assert np.asarray(read_image(tmp_path / f"x{suffix}")).min() > 250


def test_transparency_is_dropped(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (10, 20, 30)


def test_scaling_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path in paths:
        Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    batches = ImageBatches("input", paths, to_tensor, lambda indices, _: np.array(indices), 2, 0)
    with caplog.at_level(logging.INFO, "taoq"):
        assert len(list(batches)) == 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith(".png: 16-bit values are scaled to 0..255, here and in all images like it")


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path: Path) -> None:
    """Pillow reads PGM files of 16 bits in the mode I."""
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 65535 " + bytes([0, 200, 1, 44]))
    assert grey(tmp_path / "x.pgm").tolist() == [[1, 1]]


def test_programs_are_not_pictures(tmp_path: Path) -> None:
    """Pillow would pass PostScript to Ghostscript, whatever the suffix."""
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(UnidentifiedImageError):
        read_image(tmp_path / "x.jpg")
