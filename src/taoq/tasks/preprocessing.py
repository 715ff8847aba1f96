# SPDX-License-Identifier: Apache-2.0
"""How an image becomes the input of a network: resize, crop or pad, normalize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from taoq.errors import Fault
from taoq.plain import JsonObject

if TYPE_CHECKING:  # Imported by the functions that need them, because specs import the names below.
    from PIL import Image
    from torch import Tensor

RESIZES = ("squash", "shorter_side", "fit_and_pad")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
CROP_ROUNDINGS = ("even", "down")
CHANNEL_ORDERS = ("rgb", "bgr")
_ONLY_PILLOW = ("box", "hamming", "lanczos")
"""Interpolations that only Pillow has, whose resizing is always antialiased."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Function that converts an image into the input of a network.

    Attributes:
        size: Height and width of the input, pixels.
        resize: squash: both sides become `resize_to`. shorter_side: the shorter side does, the other keeps the aspect
            ratio. fit_and_pad: the longer side does.
        resize_to: Pixels. What the resized image has more than the input is cut off around its centre; what it has
            less is padded on both sides.
        interpolation: One of INTERPOLATIONS.
        antialias: Whether each pixel is the mean of all pixels that it covers when an image shrinks, as in Pillow.
        crop_rounding: Where the crop begins if it cuts off an odd number of pixels: half of that is rounded to the
            even number, as in torchvision and timm, or down, as in transformers.
        pad_color: Red, green and blue of the padding, 0..255.
        channel_order: rgb or bgr.
        mean: Subtracted from red, green and blue, which are scaled to 0..1.
        std: What red, green and blue are divided by after that.
    """

    size: tuple[int, int]
    resize: str = "squash"
    resize_to: int
    interpolation: str = "bilinear"
    antialias: bool = True
    crop_rounding: str = "even"
    pad_color: tuple[int, ...] = (0, 0, 0)
    channel_order: str = "rgb"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an RGB image as float32, [3, height, width]."""
        from torchvision.transforms import functional

        image = resized(image, self._resized_size(image.size), self.interpolation, antialias=self.antialias)
        tensor: Tensor = functional.to_tensor(self._cropped(self._padded(image)))
        tensor = functional.normalize(tensor, list(self.mean), list(self.std))
        return tensor.flip(0) if self.channel_order == "bgr" else tensor

    def _resized_size(self, image: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width to which an image of a width and a height is resized."""
        width, height = image
        if self.resize == "squash":
            return self.resize_to, self.resize_to
        if self.resize == "fit_and_pad":
            width, height = fit((self.resize_to, self.resize_to), image)
            return height, width
        # As in torchvision and transformers, where the longer side is rounded down.
        shorter = min(width, height)
        return int(self.resize_to * height / shorter), int(self.resize_to * width / shorter)

    def _padded(self, image: Image.Image) -> Image.Image:
        missing_x, missing_y = max(0, self.size[1] - image.width), max(0, self.size[0] - image.height)
        if not missing_x and not missing_y:
            return image
        from PIL import Image

        left, top = missing_x // 2, missing_y // 2
        canvas = Image.new("RGB", (image.width + missing_x, image.height + missing_y), tuple(self.pad_color))
        canvas.paste(image, (left, top))
        return canvas

    def _cropped(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        rounding = round if self.crop_rounding == "even" else int  # round() takes the even one of two numbers.
        left, top = rounding((image.width - width) / 2), rounding((image.height - height) / 2)
        if (image.width, image.height) == (width, height):
            return image
        return image.crop((left, top, left + width, top + height))

    @property
    def pads(self) -> bool:
        """Whether resized images can be smaller than the input."""
        return self.resize == "fit_and_pad" or self.resize_to < self.size[0]

    @property
    def crops(self) -> bool:
        """Whether resized images can be larger than the input."""
        return self.resize == "shorter_side" or self.resize_to > self.size[0]

    def to_json(self) -> JsonObject:
        """Return what whoever deploys the network has to do with an image, for the manifest and exported files."""
        steps: JsonObject = {"resize": self.resize, "resize_to": self.resize_to, "interpolation": self.interpolation}
        steps["antialias"] = self.antialias
        if self.crops:
            steps["crop_rounding"] = self.crop_rounding
        if self.pads:
            steps["pad_color"] = list(self.pad_color)
        return steps | {
            "height": self.size[0],
            "width": self.size[1],
            "channel_order": self.channel_order,
            "scale": 1 / 255,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def __str__(self) -> str:
        """Return one line, for the log."""
        side = {"squash": "both sides", "shorter_side": "shorter side", "fit_and_pad": "longer side"}[self.resize]
        parts = [f"{side} to {self.resize_to}, {self.interpolation}" + ("" if self.antialias else " without antialias")]
        if self.crops:
            parts.append(f"centre crop {self.size[0]}")
        if self.pads:
            parts.append(f"padded with {list(self.pad_color)} to {self.size[0]}")
        if self.channel_order != "rgb":
            parts.append(self.channel_order)
        return "; ".join([*parts, f"mean {_short(self.mean)}", f"std {_short(self.std)}"])


def _short(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def resized(image: Image.Image, size: tuple[int, int], interpolation: str, *, antialias: bool) -> Image.Image:
    """Resize an image to a height and a width.

    Args:
        image: The image.
        size: Height and width, pixels.
        interpolation: One of INTERPOLATIONS.
        antialias: Whether to antialias; False only for those that torch has.
    """
    from torchvision.transforms import InterpolationMode, functional

    mode, sides = InterpolationMode(interpolation), list(size)
    result: Image.Image
    if antialias:
        result = functional.resize(image, sides, mode)
    else:  # Pillow always does.
        pixels = functional.resize(functional.pil_to_tensor(image), sides, mode, antialias=False)
        result = functional.to_pil_image(pixels)
    return result


def interpolation_faults(interpolation: str, *, antialias: bool, where: str) -> list[Fault]:
    """Return the fault of an interpolation that exists only with antialiasing, if there is one.

    Args:
        interpolation: One of INTERPOLATIONS.
        antialias: Whether to antialias.
        where: Section of the two fields.
    """
    if antialias or interpolation not in _ONLY_PILLOW:
        return []
    what = f"is false, but {interpolation} exists only with it"
    return [Fault(f"{where}.antialias", what, "write nearest, bilinear or bicubic, or antialias: true")]


def fit(size: tuple[int, int], image: tuple[float, float]) -> tuple[int, int]:
    """Return the width and height, in pixels, to which an image must be scaled to just fit the input.

    Args:
        size: Height and width of the input.
        image: Width and height of the image.
    """
    width, height = map(int, image)
    scale = min(Fraction(size[0], height), Fraction(size[1], width))  # exact, so that a half is always rounded the same
    return max(1, round(width * scale)), max(1, round(height * scale))
