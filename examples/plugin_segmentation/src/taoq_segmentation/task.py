# SPDX-License-Identifier: Apache-2.0
"""The segmentation task: network, data and metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision import transforms
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from taoq.checkpoint import load_weights
from taoq.errors import Fault, NotGiven, SpecError, TaoqError
from taoq.network import Inputs, OutputSpec
from taoq.tasks.base import Metric, Task
from taoq.tasks.image_files import draw, image_files, image_folder
from taoq.tasks.images import ImageBatches
from taoq.tasks.metrics import metric_factory
from taoq.tasks.sections import batch_size
from taoq_segmentation.spec import ImagesSpec, SegmentationSpec


class SegFormer(nn.Module):
    """A SegFormer with logits resized to the size of the input."""

    def __init__(self, spec: SegmentationSpec) -> None:
        super().__init__()
        config = SegformerConfig(
            num_labels=spec.dataset.num_classes,
            hidden_sizes=spec.model.channels,
            depths=spec.model.depths,
            num_attention_heads=[1, 2, 4, 8],
            decoder_hidden_size=spec.model.decoder_channels,
        )
        self.network = SegformerForSemanticSegmentation(config)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [N, classes, H, W] for images [N, 3, H, W]."""
        logits = self.network(image).logits
        return functional.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=False)


def build_model(spec: SegmentationSpec, checkpoint: str | None) -> nn.Module:
    """Build the network and load a checkpoint.

    Args:
        spec: The spec.
        checkpoint: Path of the checkpoint; None keeps the initial weights.

    Raises:
        SpecError: If the path is empty: the spec names no checkpoint.
        TaoqError: If the checkpoint cannot be loaded.
    """
    if checkpoint == "":
        raise SpecError(Fault("quantize.model_path", "missing: no checkpoint is given", "train one with train.py"))
    model = SegFormer(spec).eval()
    if checkpoint:
        load_weights(model, checkpoint, "check the section model and dataset.num_classes")
    return model


@dataclass(frozen=True)
class Masks:
    """Load masks, resized to the size of the input."""

    paths: Sequence[Path]
    size: int

    def __call__(self, indices: Sequence[int], _sizes: object) -> Tensor:
        """Return class indices [N, size, size] of the images with these indices."""
        return torch.stack([torch.from_numpy(self.load(self.paths[index])) for index in indices])

    def load(self, path: Path) -> NDArray[np.int64]:
        """Load one mask, [size, size]."""
        try:
            with Image.open(path) as mask:
                return np.array(mask.resize((self.size, self.size), Image.Resampling.NEAREST), np.int64)
        except OSError as error:
            raise TaoqError(Fault(str(path), f"cannot be read: {error}", "write a PNG of class indices")) from error


def no_targets(indices: Sequence[int], _sizes: object) -> None:
    """Return no targets: calibration needs none."""


def transform(size: int) -> transforms.Compose:
    """Return the preprocessing of images, for training and evaluation: resize to `size`, scale to -2..2."""
    return transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    )


def list_images(section: ImagesSpec, where: str) -> list[Path]:
    """Return the image files of a section.

    Args:
        section: The section.
        where: Its path in the spec, for messages.

    Raises:
        NotGiven: If the section names no folder.
    """
    if not section.images_dir:
        raise NotGiven(Fault(f"{where}.images_dir", "missing: this needs images", "name a folder of images"))
    return image_files(image_folder(section.images_dir, f"{where}.images_dir"), f"{where}.images_dir")


def calibration_batches(spec: SegmentationSpec) -> ImageBatches:
    """Return a random, seeded selection of the calibration images."""
    data, section = spec.dataset, spec.quantize.calibration
    paths = draw(list_images(data.calibration, "dataset.calibration"), section.num_samples, section.seed)
    size = section.batch_size or data.batch_size
    return ImageBatches("image", paths, transform(data.img_size), no_targets, size, data.workers)


def evaluation_batches(spec: SegmentationSpec) -> ImageBatches:
    """Return all evaluation images with their masks."""
    data = spec.dataset
    paths = list_images(data.val, "dataset.val")
    folder = image_folder(data.val.masks_dir, "dataset.val.masks_dir")
    masks = [folder / f"{path.stem}.png" for path in paths]
    missing = next((mask for mask in masks if not mask.is_file()), None)
    if missing:
        raise SpecError(Fault("dataset.val.masks_dir", f"there is no {missing}", "give each image a mask of its name"))
    size = batch_size(spec.evaluate, data.batch_size)
    return ImageBatches("image", paths, transform(data.img_size), Masks(masks, data.img_size), size, data.workers)


def metric(spec: SegmentationSpec) -> Metric:
    """Return the metrics: mean intersection over union of the classes, and pixel accuracy."""
    classes = spec.dataset.num_classes
    metrics = {"mIoU": MulticlassJaccardIndex(classes), "pixel_acc": MulticlassAccuracy(classes, average="micro")}
    return metric_factory(MetricCollection(metrics))()


def example_inputs(spec: SegmentationSpec) -> Inputs:
    """Return a batch with one grey image."""
    return {"image": torch.zeros(1, 3, spec.dataset.img_size, spec.dataset.img_size)}


TASK = Task(
    name="segmentation",
    spec=SegmentationSpec,
    build_model=build_model,
    example_inputs=example_inputs,
    outputs=lambda spec: {"logits": OutputSpec(("N", spec.dataset.num_classes, "H", "W"))},
    calibration_batches=calibration_batches,
    evaluation_batches=evaluation_batches,
    metric=metric,
    libraries=("transformers",),
    sensitive={"network.segformer.encoder.patch_embeddings.0.*": "the first layer", "*.classifier": "the last layer"},
)
