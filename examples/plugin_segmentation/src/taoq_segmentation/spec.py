# SPDX-License-Identifier: Apache-2.0
"""The spec of the segmentation task."""

from __future__ import annotations

from dataclasses import dataclass

from taoq.spec.fields import option
from taoq.tasks.sections import TaskSpec


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The `model:` section: a SegFormer with four stages (https://arxiv.org/abs/2105.15203)."""

    channels: list[int] = option(lambda: [32, 64, 160, 256], "Channels of each stage")
    depths: list[int] = option(lambda: [2, 2, 2, 2], "Layers of each stage")
    decoder_channels: int = option(256, "Channels of the decoder", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ImagesSpec:
    """A folder of images and a folder of their masks."""

    images_dir: str = option("", "Folder of images")
    masks_dir: str = option("", "Folder of PNG masks with the names of the images; pixel values are class indices")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The `dataset:` section."""

    num_classes: int = option(11, "Number of classes, including the background", minimum=2)
    img_size: int = option(160, "Width and height of the input, pixels", minimum=32)
    batch_size: int = option(8, "Images per batch", minimum=1)
    workers: int = option(0, "Worker processes that read images", minimum=0)
    val: ImagesSpec = option(ImagesSpec, "Images and masks for evaluation")
    calibration: ImagesSpec = option(ImagesSpec, "Images for calibration; masks are not needed")


@dataclass(frozen=True, kw_only=True)
class SegmentationSpec(TaskSpec):
    """A segmentation spec."""

    model: ModelSpec = option(ModelSpec, "The network")
    dataset: DatasetSpec = option(DatasetSpec, "The data")
