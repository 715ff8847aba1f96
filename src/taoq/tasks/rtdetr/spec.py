# SPDX-License-Identifier: Apache-2.0
"""The spec of rtdetr, after TAO 7.0.1."""

from __future__ import annotations

from dataclasses import dataclass

from taoq.plain import JsonObject
from taoq.spec.fields import option
from taoq.tasks import sections
from taoq.tasks.sections import EvaluateSpec, InferenceSpec, TaskSpec

BACKBONES = ("resnet_18", "resnet_34", "resnet_50", "resnet_101")
_TRAINING = "used in training only"
_SIZE = "taoq's input size is dataset.augmentation.eval_spatial_size"
UNUSED = sections.UNUSED | {
    "model.pretrained_backbone_path": _TRAINING,
    "model.train_backbone": _TRAINING,
    "model.dropout_ratio": _TRAINING,
    "model.dn_number": _TRAINING,
    "model.feat_channels": "they are model.hidden_dim",
    "model.*_loss_coef": _TRAINING,
    "model.*_cost": _TRAINING,
    "model.alpha": _TRAINING,
    "model.gamma": _TRAINING,
    "model.aux_loss": _TRAINING,
    "model.loss_types": _TRAINING,
    "model.clip_max_norm": _TRAINING,
    "model.frozen_fm.backbone": "of a frozen foundation model, which taoq does not have",
    "model.frozen_fm.checkpoint": "of a frozen foundation model, which taoq does not have",
    "dataset.train_data_sources": _TRAINING,
    "dataset.pin_memory": "taoq decides it by the device",
    "dataset.dataset_type": "how TAO keeps the json in memory",
    "dataset.augmentation.train_spatial_size": _TRAINING,
    "dataset.augmentation.multi_scales": _TRAINING,
    "dataset.augmentation.distortion_prob": _TRAINING,
    "dataset.augmentation.iou_crop_prob": _TRAINING,
    "evaluate.input_width": _SIZE,
    "evaluate.input_height": _SIZE,
    "inference.input_width": _SIZE,
    "inference.input_height": _SIZE,
    "inference.is_internal": "a layout of folders inside NVIDIA",
}
"""Fields of TAO's spec that are accepted and not used, with the reason."""


@dataclass(frozen=True, kw_only=True)
class FrozenModelSpec:
    """TAO's frozen foundation model beside the backbone."""

    enabled: bool = option(False, "TAO's frozen C-RADIO branch, which no library has: only false is possible")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The `model:` section: defaults are TAO's and the paper's RT-DETR-R50 (arXiv:2304.08069)."""

    architecture: str = option("rtdetr", "RT-DETR, or RT-DETRv2 (arXiv:2407.17140)", options=("rtdetr", "rtdetr_v2"))
    backbone: str = option("resnet_50", "Backbone: a ResNet-vd", options=BACKBONES)
    backbone_args: JsonObject = option(
        dict, "Arguments of transformers' RTDetrResNetConfig, over those of the backbone: hidden_sizes, depths, ..."
    )
    args: JsonObject = option(
        dict, "Arguments of transformers' RTDetrConfig, over those that come from the fields here"
    )
    fuse: bool = option(
        True, "Fold batch norms and RepVGG branches into convolutions: same outputs, fewer layers, faster"
    )
    return_interm_indices: list[int] = option(lambda: [1, 2, 3], "Backbone stages (from 0) that the encoder takes")
    num_feature_levels: int = option(3, "Feature maps that the decoder attends to", minimum=1)
    feat_strides: list[int] = option(lambda: [8, 16, 32], "Stride of each feature map, pixels")
    use_encoder_idx: list[int] = option(lambda: [2], "Feature maps that self-attention (AIFI) runs on")
    hidden_dim: int = option(256, "Width of encoder and decoder", minimum=1)
    nheads: int = option(8, "Attention heads", minimum=1)
    dim_feedforward: int = option(1024, "Width of the feed-forward layers", minimum=1)
    enc_layers: int = option(1, "Self-attention layers of the encoder", minimum=0)
    dec_layers: int = option(6, "Decoder layers", minimum=1)
    eval_idx: int = option(-1, "Decoder layer (from 0) whose output counts; -1 is the last; later ones are left out")
    expansion: float = option(1.0, "Width of the fusion blocks, as a part of hidden_dim (0.5 in R18 and R34)")
    depth_mult: int = option(1, "Depth of the fusion blocks; transformers has 1 only", minimum=1)
    enc_act: str = option("gelu", "Activation of the encoder's feed-forward layers")
    act: str = option("silu", "Activation of the fusion blocks")
    pe_temperature: int = option(10000, "Temperature of the position embedding", minimum=1)
    num_queries: int = option(300, "Object queries", minimum=1)
    num_select: int = option(300, "Detections per image: the best num_select of queries x classes", minimum=1)
    frozen_fm: FrozenModelSpec = option(FrozenModelSpec, "TAO's frozen foundation model")


@dataclass(frozen=True, kw_only=True)
class CocoSpec:
    """Images with their COCO annotations."""

    image_dir: str = option("", "Folder of the images")
    json_file: str = option("", "COCO json; its file names are relative to image_dir")


@dataclass(frozen=True, kw_only=True)
class ImagesSpec:
    """Folders of images without annotations."""

    image_dir: list[str] = option(list, "Folders of images")
    classmap: str = option("", "Text file with the class names, one a line")


@dataclass(frozen=True, kw_only=True)
class AugmentationSpec:
    """The part of TAO's augmentation that evaluation uses too."""

    eval_spatial_size: list[int] = option(
        lambda: [640, 640], "Height and width of the input, pixels; multiples of the largest stride"
    )
    preserve_aspect_ratio: bool = option(
        False, "Keep the shape of the image and pad to the right and below with black, instead of stretching"
    )


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The `dataset:` section."""

    val_data_sources: CocoSpec = option(CocoSpec, "Annotated images for evaluate, where test_data_sources is not given")
    test_data_sources: CocoSpec = option(CocoSpec, "Annotated images for evaluate")
    quant_calibration_data_sources: CocoSpec = option(
        CocoSpec, "Images for calibration: all of the folder, or those that the json names; annotations are not needed"
    )
    infer_data_sources: ImagesSpec = option(ImagesSpec, "Images for inference")
    num_classes: int = option(
        80, "Outputs per query: the number of categories, or TAO's largest category id + 1", minimum=1
    )
    remap_mscoco_category: bool = option(
        False, "The categories are COCO's 80 with ids up to 90; not needed, num_classes says it"
    )
    eval_class_ids: list[int] | None = option(None, "Evaluate these category ids only")
    batch_size: int = option(4, "Images per batch", minimum=1)
    workers: int = option(8, "Processes that read images; at most one per processor is started", minimum=0)
    augmentation: AugmentationSpec = option(AugmentationSpec, "Input size")


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluateSpec(EvaluateSpec):
    """The `evaluate:` section."""

    conf_threshold: float = option(0.0, "Detections with a lower score are left out; 0 for COCO's AP", minimum=0)


@dataclass(frozen=True, kw_only=True)
class DetectionInferenceSpec(InferenceSpec):
    """The `inference:` section."""

    conf_threshold: float = option(0.5, "Detections with a lower score are left out", minimum=0)
    color_map: dict[str, str] | None = option(None, "Colour of the boxes of a class, by its name: {car: red}")
    outline_width: int = option(3, "Width of a box's outline, pixels", minimum=1)


@dataclass(frozen=True, kw_only=True)
class RtdetrSpec(TaskSpec):
    """An rtdetr spec."""

    model: ModelSpec = option(ModelSpec, "The network")
    dataset: DatasetSpec = option(DatasetSpec, "The data")
    evaluate: DetectionEvaluateSpec = option(DetectionEvaluateSpec, "What to evaluate")
    inference: DetectionInferenceSpec = option(DetectionInferenceSpec, "What to run on new images")
