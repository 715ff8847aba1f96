# SPDX-License-Identifier: Apache-2.0
"""Functions that adapt `export` to classification_pyt."""

from __future__ import annotations

import dataclasses
import logging
import statistics

from taoq.checkpoint import WithoutInitialisation
from taoq.errors import Fault, Notice, SpecError
from taoq.tasks.base import DeepStream
from taoq.tasks.classification.classes import class_names_or_numbers
from taoq.tasks.classification.data import preprocessing
from taoq.tasks.classification.model import build_model
from taoq.tasks.classification.spec import ClassificationSpec

log = logging.getLogger(__name__)

_SCALING_FILTERS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 4}
"""Values of NvBufSurfTransform_Inter for interpolations (DeepStream, nvbufsurftransform.h)."""


def with_size(spec: ClassificationSpec, height: int, width: int) -> ClassificationSpec:
    """Return the spec for another input size (pixels).

    Raises:
        SpecError: If the size is not square, or if the network does not take it.
    """
    if height != width:
        what = f"the input is {height} x {width} (height x width), classification_pyt has square inputs"
        raise SpecError(Fault("export.input_height", what, "write the same input_height and input_width"))
    resized = dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, img_size=height))
    if spec.model.backbone.type:  # An artifact knows its network.
        with WithoutInitialisation():
            build_model(resized, None, "export.input_height")
    return resized


def deepstream(spec: ClassificationSpec) -> DeepStream:
    """Return the DeepStream configuration.

    Gst-nvinfer normalizes pixels in 0..255 as `net-scale-factor * (pixel - offset)`, with one factor for all channels.
    It resizes to the input, with or without the aspect ratio, and does not crop (DeepStream 7, "Gst-nvinfer").
    """
    transform = preprocessing(spec.dataset.augmentation, spec.dataset.img_size)
    mean, std = transform.mean, transform.std
    padded = transform.resize == "fit_and_pad"
    if transform.resize == "shorter_side" or transform.resize_to != transform.size[0]:
        becomes = "pads them to it" if padded else "squashes them"
        what = f"DeepStream resizes images to the input, without a crop: it {becomes}, instead of {transform}"
        log.warning(Notice("export.serialize_nvdsinfer", what))
    if transform.interpolation not in _SCALING_FILTERS:
        what = f"DeepStream has no {transform.interpolation}: it takes bilinear"
        log.warning(Notice("export.serialize_nvdsinfer", what))
    if padded and any(transform.pad_color):
        what = f"DeepStream pads with black, not with {list(transform.pad_color)}"
        log.warning(Notice("export.serialize_nvdsinfer", what))
    if len(set(std)) > 1:
        what = "DeepStream has one scale for all channels, dataset.augmentation.std has three: their mean is written"
        log.warning(Notice("export.serialize_nvdsinfer", what))
    bgr = transform.channel_order == "bgr"
    scaling = _SCALING_FILTERS.get(transform.interpolation, _SCALING_FILTERS["bilinear"])
    return DeepStream(
        {
            "network-type": 1,
            "net-scale-factor": 1 / (255 * statistics.fmean(std)),
            "offsets": ";".join(f"{255 * value:.4f}" for value in (mean[::-1] if bgr else mean)),
            **({"model-color-format": 1} if bgr else {}),
            **({"maintain-aspect-ratio": 1, "symmetric-padding": 1} if padded else {}),
            **({"scaling-filter": scaling} if scaling != _SCALING_FILTERS["bilinear"] else {}),
            "output-blob-names": "output",
        },
        ";".join(class_names_or_numbers(spec)) + "\n",
    )
