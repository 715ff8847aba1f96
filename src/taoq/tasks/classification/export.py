# SPDX-License-Identifier: Apache-2.0
"""Functions that adapt `export` to classification_pyt."""

from __future__ import annotations

import dataclasses
import logging
import statistics

from taoq.errors import Fault, Notice, SpecError
from taoq.tasks.base import DeepStream
from taoq.tasks.classification.data import class_names_or_numbers
from taoq.tasks.classification.names import check_size
from taoq.tasks.classification.spec import ClassificationSpec

log = logging.getLogger(__name__)


def with_size(spec: ClassificationSpec, height: int, width: int) -> ClassificationSpec:
    """Return the spec for another input size (pixels).

    Raises:
        SpecError: If the size is not square, or if the network does not take it.
    """
    if height != width:
        what = f"the input is {height} x {width} (height x width), classification_pyt has square inputs"
        raise SpecError(Fault("export.input_height", what, "write the same input_height and input_width"))
    check_size(spec.model.backbone, height, "export.input_height")
    return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, img_size=height))


def deepstream(spec: ClassificationSpec) -> DeepStream:
    """Return the DeepStream configuration.

    Gst-nvinfer normalizes pixels in 0..255 as `net-scale-factor * (pixel - offset)`, with one factor for all channels.
    """
    mean, std = spec.dataset.augmentation.mean, spec.dataset.augmentation.std
    if len(set(std)) > 1:
        what = "DeepStream has one scale for all channels, dataset.augmentation.std has three: their mean is written"
        log.warning(Notice("export.serialize_nvdsinfer", what))
    return DeepStream(
        {
            "network-type": 1,
            "net-scale-factor": 1 / (255 * statistics.fmean(std)),
            "offsets": ";".join(f"{255 * value:.4f}" for value in mean),
            "output-blob-names": "output",
        },
        ";".join(class_names_or_numbers(spec)) + "\n",
    )
