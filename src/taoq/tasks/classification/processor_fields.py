# SPDX-License-Identifier: Apache-2.0
"""Describe an image processor of transformers by fields of `dataset.augmentation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from taoq.errors import Fault, TaoqError
from taoq.tasks.classification.data import preprocessing
from taoq.tasks.classification.spec import AugmentationSpec
from taoq.tasks.image_processor import given, interpolation_of, read_processor
from taoq.tasks.preprocessing import Preprocessing

_WRITE = "write the fields of dataset.augmentation"


def fields_of_processor(folder: str, where: str) -> tuple[int, Mapping[str, Any]]:
    """Return the size of the input, pixels, and the fields of `dataset.augmentation` of an image processor.

    The class of transformers that the file names fills in what it leaves out. Its code in a folder is never run. Since
    each class may resize in its own way, the transform of these fields is compared with the class on an image.

    Args:
        folder: A folder with preprocessor_config.json.
        where: The field that names it, for messages.

    Raises:
        TaoqError: If the file is missing or cannot be read, or if its processing has no fields here.
    """
    processor = read_processor(folder, where)
    size, fields = _size_and_resize(processor, folder, where)
    fields |= {"crop_rounding": "down", **_normalization(processor)}
    if getattr(processor, "do_flip_channel_order", False):
        fields["channel_order"] = "bgr"
    difference = _difference(processor, preprocessing(AugmentationSpec(**fields), size), fields["std"])
    if difference > 1.5:
        what = f"{folder} has a {type(processor).__name__}, which taoq's fields do not describe"
        what += f": pixels differ by up to {difference:.0f} of 255"
        raise TaoqError(Fault(where, what, _WRITE))
    return size, fields


def _size_and_resize(processor: Any, folder: str, where: str) -> tuple[int, dict[str, Any]]:
    """Return the size of the input and the fields of the resize."""
    size, crop = _sides(processor.size), _sides(getattr(processor, "crop_size", None))
    fields: dict[str, Any] = {"interpolation": interpolation_of(processor)}
    fraction = getattr(processor, "crop_pct", None)
    if not processor.do_resize:
        raise TaoqError(Fault(where, f"{folder} does not resize images, so that inputs differ in size", _WRITE))
    if not size:
        what = f"{folder} resizes to {given(processor.size)}, which is not one size of square inputs"
        raise TaoqError(Fault(where, what, _WRITE))
    cropped = crop.get("height") if processor.do_center_crop else None
    if "edge" not in size:
        fields |= {"resize": "squash", "resize_to": size["height"]}
        return cropped or size["height"], fields
    edge = size["edge"]
    if fraction and not cropped:  # ConvNeXt's: cropped below 384 pixels, squashed from there on.
        if edge >= 384:
            return edge, fields | {"resize": "squash", "resize_to": edge}
        return edge, fields | {"resize": "shorter_side", "resize_to": int(edge / fraction)}
    if fraction:  # PoolFormer's
        edge = int(edge / fraction)
    elif type(processor).__name__.startswith("Levit"):
        edge = int(256 / 224 * edge)
    if not cropped:
        what = f"{folder} keeps the aspect ratio without a crop, so that inputs differ in size"
        raise TaoqError(Fault(where, what, _WRITE))
    return cropped, fields | {"resize": "shorter_side", "resize_to": edge}


def _sides(size: Any) -> dict[str, int]:
    """Return `edge`, the shorter side, or `height` of a size whose width is the same."""
    values = given(size)
    if values.keys() == {"shortest_edge"}:
        return {"edge": int(values["shortest_edge"])}
    if values.keys() == {"height", "width"} and values["height"] == values["width"]:
        return {"height": int(values["height"])}
    return {}


def _normalization(processor: Any) -> dict[str, list[float]]:
    """Return mean and std of pixels in 0..1 that do all that a processor does with pixels in 0..255."""
    scale, offset = np.ones(3), np.zeros(3)  # value = scale * pixel / 255 - offset
    if processor.do_rescale:
        scale = scale * 255 * processor.rescale_factor
        if getattr(processor, "rescale_offset", False):
            offset = offset + 1
    else:
        scale = scale * 255
    if processor.do_normalize:
        mean, std = np.array(processor.image_mean, float), np.array(processor.image_std, float)
        scale, offset = scale / std, (offset + mean) / std
        if getattr(processor, "include_top", False):  # EfficientNet's second normalization
            scale, offset = scale / std, offset / std
    return {"mean": [float(value) for value in offset / scale], "std": [float(value) for value in 1 / scale]}


def _difference(processor: Any, transform: Preprocessing, std: Sequence[float]) -> float:
    """Return the largest difference of two transforms on an image of noise and one of edges, in levels of 255."""
    generator = np.random.default_rng(0)
    differences = []
    for height, width in ((211, 307), (402, 289)):
        rough = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0], np.float64)
        ours = transform(image).numpy().astype(np.float64)
        if theirs.shape != ours.shape:
            return 255.0
        levels = np.abs(theirs - ours).max((1, 2)) * np.array(std) * 255
        differences.append(float(levels.max()))
    return max(differences)
