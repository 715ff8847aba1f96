# SPDX-License-Identifier: Apache-2.0
"""How a published detector is fed: what preprocessor_config.json of Hugging Face says about it."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from taoq.errors import Fault, Notice, TaoqError
from taoq.tasks.image_processor import given, interpolation_of, processor_folder, read_processor
from taoq.tasks.published import IsWritten, fill_in, warn_of
from taoq.tasks.rtdetr.spec import RtdetrSpec

log = logging.getLogger(__name__)

_AUGMENTATION = "dataset.augmentation"
_PREPROCESSING = f"{_AUGMENTATION}.preprocessing"


def with_published(spec: RtdetrSpec, is_written: IsWritten) -> RtdetrSpec:
    """Return the spec with the preprocessing of the published network in the fields that the user did not write.

    Args:
        spec: The spec.
        is_written: Whether the user wrote a field.

    Raises:
        SpecError: If there is no preprocessor_config.json.
        TaoqError: If it cannot be read, or if it normalizes or pads images in a way that rtdetr has not.
    """
    own = spec.dataset.augmentation
    if not own.preprocessing:
        return spec
    folder = processor_folder(spec, own.preprocessing.partition("/")[2], _PREPROCESSING)
    theirs = _fields(read_processor(folder, _PREPROCESSING), folder)
    augmentation, differences = fill_in(own, _AUGMENTATION, theirs, is_written)
    height, width = theirs["eval_spatial_size"]
    what = f"huggingface: {folder}: resized to {height} x {width} (height x width), {theirs['interpolation']}"
    log.info(Notice(_PREPROCESSING, what))
    warn_of(differences, folder)
    return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, augmentation=augmentation))


def _fields(processor: Any, folder: str) -> dict[str, Any]:
    """Return the fields of `dataset.augmentation` that a processor describes."""
    size = given(processor.size)
    what = ""
    if not processor.do_resize or size.keys() != {"height", "width"}:
        what = f"resizes images to {size if processor.do_resize else 'no size'}, not to one height and width"
    elif processor.do_normalize:
        what = f"normalizes images (mean {list(processor.image_mean)}), which RT-DETR and TAO do not"
    elif not processor.do_rescale or not math.isclose(processor.rescale_factor, 1 / 255):
        what = "does not scale pixels to 0..1"
    elif processor.do_pad:
        what = "pads images, which RT-DETR does not"
    if what:
        raise TaoqError(Fault(_PREPROCESSING, f"{folder} {what}", "leave the field out, if the network was trained so"))
    return {
        "eval_spatial_size": [int(size["height"]), int(size["width"])],
        "preserve_aspect_ratio": False,
        "interpolation": interpolation_of(processor),
        "antialias": True,
    }
