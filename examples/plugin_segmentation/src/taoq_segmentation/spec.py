# SPDX-License-Identifier: Apache-2.0
"""The spec of segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from taoq.spec.fields import option
from taoq.tasks.sections import TaskSpec


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The `model:` section: a SegFormer of four stages (https://arxiv.org/abs/2105.15203)."""

    channels: list[int] = option(lambda: [32, 64, 160, 256], "Channels of each stage")
    depths: list[int] = option(lambda: [2, 2, 2, 2], "Layers of each stage")
    decoder_channels: int = option(256, "Channels of the decoder", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ImagesSpec:
    """A folder of images, and one of masks."""

    images_dir: str = option("", "Folder of images")
    masks_dir: str = option("", "Folder of PNG masks of the same names; a pixel is the index of its class")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The `dataset:` section."""

    num_classes: int = option(11, "Number of classes, the background included", minimum=2)
    img_size: int = option(160, "Width and height of the input, pixels", minimum=32)
    batch_size: int = option(8, "Images per batch", minimum=1)
    workers: int = option(0, "Processes that read images", minimum=0)
    val: ImagesSpec = option(ImagesSpec, "Labelled images for evaluate")
    calibration: ImagesSpec = option(ImagesSpec, "Images for calibration; masks are not needed")


@dataclass(frozen=True, kw_only=True)
class SegmentationSpec(TaskSpec):
    """A segmentation spec."""

    model: ModelSpec = option(ModelSpec, "The network")
    dataset: DatasetSpec = option(DatasetSpec, "The data")
