# SPDX-License-Identifier: Apache-2.0
"""What export needs to know of a classifier."""

from __future__ import annotations

import dataclasses
import logging
import statistics

from taoq.errors import Fault, Notice, SpecError
from taoq.tasks.base import DeepStream
from taoq.tasks.classification.data import known_classes
from taoq.tasks.classification.spec import ClassificationSpec

log = logging.getLogger(__name__)


def with_size(spec: ClassificationSpec, height: int, width: int) -> ClassificationSpec:
    """The spec for another input size.

    Raises:
        SpecError: It is not square.
    """
    if height != width:
        what = f"the input is {height} x {width} (height x width), classification_pyt has square inputs"
        raise SpecError(Fault("export.input_height", what, "write the same input_height and input_width"))
    return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, img_size=height))


def deepstream(spec: ClassificationSpec) -> DeepStream:
    """Gst-nvinfer computes scale * (pixel - offset) with one scale for all channels."""
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
        ";".join(known_classes(spec)) + "\n",
    )
