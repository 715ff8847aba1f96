# SPDX-License-Identifier: Apache-2.0
"""The spec of classification_pyt, with the fields of TAO 7.0.1."""

from __future__ import annotations

from dataclasses import dataclass

from taoq.plain import JsonObject
from taoq.spec.fields import option
from taoq.tasks import sections
from taoq.tasks.preprocessing import CHANNEL_ORDERS, CROP_ROUNDINGS, INTERPOLATIONS, RESIZES
from taoq.tasks.sections import TaskSpec

_TRAINING = "used only in training"
UNUSED = sections.UNUSED | {
    "model.backbone.pretrained_backbone_path": _TRAINING,
    "model.backbone.freeze_backbone": _TRAINING,
    "model.backbone.freeze_norm": _TRAINING,
    "model.head.in_channels": "defined by the network",
    "model.head.custom_args": "only for heads of TAO",
    "model.head.loss": _TRAINING,
    "dataset.shuffle": _TRAINING,
    "dataset.train_dataset": _TRAINING,
    "dataset.train_nolabel": _TRAINING,
    "dataset.augmentation.random_*": _TRAINING,
    "dataset.augmentation.with_*": _TRAINING,
    "dataset.augmentation.mixup_*": _TRAINING,
    "evaluate.vis_after_n_batches": "pictures are drawn by inference",
}
"""Fields of TAO's spec that are accepted but not used, with the reason."""


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """The `model.backbone:` section."""

    type: str = option(
        "",
        "Name of the network in TAO (fan_small_12_p4_hybrid, resnet_50), timm or torchvision; timm/NAME or"
        " torchvision/NAME to choose the library",
        example="resnet_50",
    )
    args: JsonObject = option(dict, "Arguments for the network's constructor in its library")
    pretrained: bool = option(False, "Download the library's pretrained weights if no checkpoint is given")
    variant: str = option(
        "auto",
        "Which network of this name, where TAO's differs from timm's (swin_*, efficientvit_*): tao or library; auto"
        " takes it from the checkpoint, and library without one",
        options=("auto", "tao", "library"),
        omit_default=True,
    )


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The `model.head:` section."""

    type: str = option(
        "TAOLinearClsHead",
        "The network's own linear classifier; no public library has TAO's LogisticRegressionHead",
        options=("TAOLinearClsHead",),
    )
    binary: bool = option(False, "TAO's head with one output; only false is supported, because no library has it")
    topk: list[int] = option(lambda: [1], "The values of k for which top-k accuracy is reported", example=[1, 5])


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The `model:` section."""

    backbone: BackboneSpec = option(BackboneSpec, "The network")
    head: HeadSpec = option(HeadSpec, "The classifier at the end of the network")
    checkpoint_key: str = option(
        "",
        "Keys that lead to the state dict in a checkpoint that has several, joined with dots: ema.module. Without it,"
        " averaged weights go first, and the log says what was taken",
        omit_default=True,
    )


@dataclass(frozen=True, kw_only=True)
class ImagesSpec:
    """A folder of images."""

    images_dir: str = option("", "Folder of images; labelled data has one folder per class")


@dataclass(frozen=True, kw_only=True)
class LabelledSpec(ImagesSpec):
    """A folder of images with labels."""

    labels_file: str = option(
        "",
        "CSV file with the name of an image (in images_dir) and its class in each row, instead of one folder per class",
        omit_default=True,
    )


@dataclass(frozen=True, kw_only=True)
class AugmentationSpec:
    """How images become inputs: the fields of TAO's augmentation that evaluation uses, too, and taoq's own."""

    preprocessing: str = option(
        "",
        "Take the fields below and img_size, where the spec does not write them, from the published network: timm,"
        " torchvision or huggingface; with /NAME those of other weights (timm/resnet50.a1_in1k,"
        " torchvision/IMAGENET1K_V1, huggingface/FOLDER)",
        pattern=r"|(timm|torchvision)(/[\w.]+)?|huggingface(/.+)?",
        omit_default=True,
    )
    resize: str = option(
        "squash",
        "squash: resize both sides, as TAO does; shorter_side: resize the shorter side, and cut off the rest of the"
        " other around the centre; fit_and_pad: resize the longer side, and pad the other on both sides",
        options=RESIZES,
        omit_default=True,
    )
    crop_fraction: float = option(
        1.0,
        "Part of the resized side that is left after cropping: img_size / crop_fraction is what images are resized to,"
        " rounded down",
        minimum=0.1,
        maximum=10,
        omit_default=True,
    )
    resize_to: int | None = option(
        None, "What images are resized to, pixels, instead of crop_fraction", minimum=1, omit_default=True
    )
    interpolation: str = option("bilinear", "Interpolation of the resize", options=INTERPOLATIONS, omit_default=True)
    antialias: bool = option(
        True,
        "Antialias where images shrink, as Pillow does; false for networks that are fed by OpenCV's resize",
        omit_default=True,
    )
    crop_rounding: str = option(
        "even",
        "Where a crop begins that cuts off an odd number of pixels: half of it, rounded to the even number (timm,"
        " torchvision) or down (transformers)",
        options=CROP_ROUNDINGS,
        omit_default=True,
    )
    pad_color: list[int] = option(
        lambda: [0, 0, 0], "Red, green and blue of padding, 0 to 255", minimum=0, maximum=255, omit_default=True
    )
    channel_order: str = option(
        "rgb",
        "Order of the channels in the input; mean and std are those of red, green and blue",
        options=CHANNEL_ORDERS,
        omit_default=True,
    )
    mean: list[float] = option(
        lambda: [0.485, 0.456, 0.406],
        "Mean of each channel (red, green, blue), which is subtracted from images scaled to 0..1",
    )
    std: list[float] = option(
        lambda: [0.229, 0.224, 0.225],
        "Standard deviation of each channel (red, green, blue), by which images are divided after that",
    )


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The `dataset:` section."""

    dataset: str = option("CLDataset", "Format of the data set: one folder per class", options=("CLDataset",))
    root_dir: str = option(
        "",
        "Folder with classes.txt, one class name per line; without this file, classes are the sorted names of the"
        " folders",
    )
    classes_file: str = option("", "File to read the class names from, instead of classes.txt in root_dir")
    num_classes: int = option(20, "Number of classes", minimum=1)
    img_size: int = option(
        224, "Width and height of the input, pixels; see augmentation for how images become that", minimum=1
    )
    batch_size: int = option(8, "Images per batch", minimum=1)
    workers: int = option(8, "Number of processes that read images; at most one per processor", minimum=0)
    val_dataset: LabelledSpec = option(LabelledSpec, "Labelled images for evaluate")
    test_dataset: LabelledSpec = option(
        LabelledSpec, "Images for inference, and for evaluate if val_dataset is not given"
    )
    quant_calibration_dataset: ImagesSpec = option(ImagesSpec, "Images for calibration; labels are not needed")
    augmentation: AugmentationSpec = option(AugmentationSpec, "How images become inputs")


@dataclass(frozen=True, kw_only=True)
class ClassificationSpec(TaskSpec):
    """A classification_pyt spec."""

    model: ModelSpec = option(ModelSpec, "The network")
    dataset: DatasetSpec = option(DatasetSpec, "The data")
