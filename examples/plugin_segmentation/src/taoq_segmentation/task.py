# SPDX-License-Identifier: Apache-2.0
"""The task: its network, its data and its metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision import transforms
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from taoq.checkpoint import load_weights
from taoq.errors import Fault, NotGiven, SpecError
from taoq.network import Inputs, OutputSpec
from taoq.tasks.base import Metric, Task
from taoq.tasks.images import ImageBatches, draw, image_files, image_folder
from taoq.tasks.metrics import metric_factory
from taoq.tasks.sections import batch_size
from taoq_segmentation.spec import ImagesSpec, SegmentationSpec


class SegFormer(nn.Module):
    """A SegFormer whose logits have the size of its input."""

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
        """Logits [N, classes, H, W] of images [N, 3, H, W]."""
        logits = self.network(image).logits
        return functional.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=False)


def build_model(spec: SegmentationSpec, checkpoint: str | None) -> nn.Module:
    """The network with the weights of a checkpoint; None leaves it as initialised."""
    if checkpoint == "":
        raise SpecError(Fault("quantize.model_path", "missing: no checkpoint is given", "train one with train.py"))
    model = SegFormer(spec).eval()
    if checkpoint:
        load_weights(model, checkpoint, "check the section model and dataset.num_classes")
    return model


@dataclass(frozen=True)
class Masks:
    """The masks of images, scaled to the size of the input."""

    paths: Sequence[Path]
    size: int

    def __call__(self, indices: Sequence[int], _sizes: object) -> Tensor:
        """Class indices [N, size, size] of some images."""
        masks = [Image.open(self.paths[index]) for index in indices]
        size = (self.size, self.size)
        scaled = [mask.resize(size, Image.Resampling.NEAREST) for mask in masks]
        return torch.stack([torch.from_numpy(np.array(mask, np.int64)) for mask in scaled])


def no_targets(indices: Sequence[int], _sizes: object) -> None:
    """Calibration needs none."""


def transform(size: int) -> transforms.Compose:
    """An image as the network takes it; training and evaluation agree on it."""
    return transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    )


def images_of(section: ImagesSpec, where: str) -> list[Path]:
    """The images of a section of the data set."""
    if not section.images_dir:
        raise NotGiven(Fault(f"{where}.images_dir", "missing: this needs images", "name a folder of images"))
    return list(image_files(image_folder(section.images_dir, f"{where}.images_dir"), f"{where}.images_dir"))


def calibration_batches(spec: SegmentationSpec) -> ImageBatches:
    """A seeded draw of calibration images."""
    data, section = spec.dataset, spec.quantize.calibration
    paths = draw(images_of(data.calibration, "dataset.calibration"), section.num_samples, section.seed)
    size = section.batch_size or data.batch_size
    return ImageBatches("image", paths, transform(data.img_size), no_targets, size, data.workers)


def evaluation_batches(spec: SegmentationSpec) -> ImageBatches:
    """All labelled images with their masks."""
    data = spec.dataset
    paths = images_of(data.val, "dataset.val")
    folder = image_folder(data.val.masks_dir, "dataset.val.masks_dir")
    masks = [folder / f"{path.stem}.png" for path in paths]
    missing = next((mask for mask in masks if not mask.is_file()), None)
    if missing:
        raise SpecError(Fault("dataset.val.masks_dir", f"there is no {missing}", "give each image a mask of its name"))
    size = batch_size(spec.evaluate, data.batch_size)
    return ImageBatches("image", paths, transform(data.img_size), Masks(masks, data.img_size), size, data.workers)


def metric(spec: SegmentationSpec) -> Metric:
    """Mean intersection over union of the classes, and accuracy of the pixels."""
    classes = spec.dataset.num_classes
    metrics = {"mIoU": MulticlassJaccardIndex(classes), "pixel_acc": MulticlassAccuracy(classes, average="micro")}
    return metric_factory(MetricCollection(metrics))()


def example_inputs(spec: SegmentationSpec) -> Inputs:
    """One grey image."""
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
