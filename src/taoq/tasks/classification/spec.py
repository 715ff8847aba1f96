# SPDX-License-Identifier: Apache-2.0
"""The spec of classification_pyt, after TAO 7.0.1."""

from __future__ import annotations

from dataclasses import dataclass

from taoq.plain import JsonObject
from taoq.spec.fields import option
from taoq.tasks import sections
from taoq.tasks.sections import TaskSpec

_TRAINING = "used in training only"
UNUSED = sections.UNUSED | {
    "model.backbone.pretrained_backbone_path": _TRAINING,
    "model.backbone.freeze_backbone": _TRAINING,
    "model.backbone.freeze_norm": _TRAINING,
    "model.head.in_channels": "the network knows it",
    "model.head.custom_args": "for TAO's own heads",
    "model.head.loss": _TRAINING,
    "dataset.shuffle": _TRAINING,
    "dataset.train_dataset": _TRAINING,
    "dataset.train_nolabel": _TRAINING,
    "dataset.augmentation.random_*": _TRAINING,
    "dataset.augmentation.with_*": _TRAINING,
    "dataset.augmentation.mixup_*": _TRAINING,
    "evaluate.vis_after_n_batches": "pictures are drawn by inference",
}
"""Fields of TAO's spec that are accepted and not used, with the reason."""


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """The network."""

    type: str = option(
        "",
        "Network: a TAO name (resnet_50, vit_base_patch16), any timm or torchvision name; timm/NAME, torchvision/NAME"
        " choose the library",
        example="resnet_50",
    )
    args: JsonObject = option(dict, "Arguments of the network's constructor in its library")
    pretrained: bool = option(False, "Take the library's pretrained weights (a download) where no checkpoint is given")


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The classifier on top."""

    type: str = option(
        "TAOLinearClsHead",
        "The network's own linear classifier; TAO's LogisticRegressionHead is in no public library",
        options=("TAOLinearClsHead",),
    )
    binary: bool = option(False, "TAO's one-output head, which no library has: only false is possible")
    topk: list[int] = option(lambda: [1], "The k of the top-k accuracies reported", example=[1, 5])


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The `model:` section."""

    backbone: BackboneSpec = option(BackboneSpec, "The network")
    head: HeadSpec = option(HeadSpec, "The classifier on top")


@dataclass(frozen=True, kw_only=True)
class ImagesSpec:
    """A folder of images."""

    images_dir: str = option("", "Folder of images; labelled data has one folder per class")


@dataclass(frozen=True, kw_only=True)
class AugmentationSpec:
    """The part of TAO's augmentation that evaluation uses too."""

    mean: list[float] = option(
        lambda: [0.485, 0.456, 0.406], "Subtracted from each channel (red, green, blue) of an image in 0..1"
    )
    std: list[float] = option(lambda: [0.229, 0.224, 0.225], "Each channel is divided by it, after the mean")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The `dataset:` section."""

    dataset: str = option("CLDataset", "Format of the data set: a folder per class", options=("CLDataset",))
    root_dir: str = option(
        "", "Folder with classes.txt, one class name a line; without it the sorted folder names count"
    )
    classes_file: str = option("", "Another file of class names")
    num_classes: int = option(20, "Number of classes", minimum=1)
    img_size: int = option(
        224, "Width and height of the input, pixels; images are resized to it without cropping", minimum=1
    )
    batch_size: int = option(8, "Images per batch", minimum=1)
    workers: int = option(8, "Processes that read images; at most one per processor is started", minimum=0)
    val_dataset: ImagesSpec = option(ImagesSpec, "Labelled images for evaluate")
    test_dataset: ImagesSpec = option(ImagesSpec, "Images for inference, and for evaluate where val_dataset has none")
    quant_calibration_dataset: ImagesSpec = option(ImagesSpec, "Images for calibration; labels are not needed")
    augmentation: AugmentationSpec = option(AugmentationSpec, "Normalisation")


@dataclass(frozen=True, kw_only=True)
class ClassificationSpec(TaskSpec):
    """A classification_pyt spec."""

    model: ModelSpec = option(ModelSpec, "The network")
    dataset: DatasetSpec = option(DatasetSpec, "The data")
