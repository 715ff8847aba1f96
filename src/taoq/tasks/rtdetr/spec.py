# SPDX-License-Identifier: Apache-2.0
"""The spec of rtdetr, with the fields of TAO 7.0.1."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from taoq.plain import JsonObject, Plain
from taoq.spec.fields import option
from taoq.tasks import sections
from taoq.tasks.backbones.tao_names import TAO_NETWORKS, TaoNetwork
from taoq.tasks.preprocessing import INTERPOLATIONS
from taoq.tasks.sections import EvaluateSpec, InferenceSpec, TaskSpec

RESNETS = ("resnet_18", "resnet_34", "resnet_50", "resnet_101")
_FANS = {
    "fan_tiny_8_p4_hybrid": "fan_tiny_8_p4_hybrid",
    "fan_small_12_p4_hybrid": "fan_small_12_p4_hybrid",
    "fan_base_12_p4_hybrid": "fan_base_16_p4_hybrid",
    "fan_large_12_p4_hybrid": "fan_large_16_p4_hybrid",
}
"""TAO's FAN backbones, and the names that the same networks have in its classification."""
_CONVNEXT_V2_SMALL = TaoNetwork(name="convnextv2_small", family="convnext", base="convnextv2_small")
"""A backbone that TAO's classification does not have."""
_SMALLEST_EDGENEXT = "edgenext_x_small"
UPSAMPLE = "upsample"
"""The argument in `backbone_args` that says whether a convolution widens each feature map of a ConvNeXt V2."""
BACKBONES = (
    *RESNETS,
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")),
    *(f"convnextv2_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "huge")),
    *(f"efficientvit_{size}" for size in ("b0", "b1", "b2", "b3", "l0", "l1", "l2", "l3")),
    *(f"edgenext_{size}" for size in ("x_small", "small", "base", "xx_small_bn_hs", "x_small_bn_hs", "small_bn_hs")),
    *_FANS,
)
"""The backbones of TAO's RT-DETR."""
_TRAINING = "used only in training"
_SIZE = "the input size is dataset.augmentation.eval_spatial_size"
_FROZEN_MODEL = "taoq does not support the frozen foundation model"
UNUSED = sections.UNUSED | {
    "model.pretrained_backbone_path": _TRAINING,
    "model.train_backbone": _TRAINING,
    "model.dropout_ratio": _TRAINING,
    "model.dn_number": _TRAINING,
    "model.load_teacher_enc_dec": _TRAINING,
    "model.backbone_names": _TRAINING,
    "model.linear_proj_names": _TRAINING,
    "model.precise_msda": "chooses between two implementations of the same attention in TAO",
    "model.feat_channels": "always equal to model.hidden_dim",
    "model.*_loss_coef": _TRAINING,
    "model.*_cost": _TRAINING,
    "model.alpha": _TRAINING,
    "model.gamma": _TRAINING,
    "model.aux_loss": _TRAINING,
    "model.loss_types": _TRAINING,
    "model.clip_max_norm": _TRAINING,
    "model.frozen_fm.backbone": _FROZEN_MODEL,
    "model.frozen_fm.checkpoint": _FROZEN_MODEL,
    "dataset.train_data_sources": _TRAINING,
    "dataset.pin_memory": "taoq chooses it by the device",
    "dataset.dataset_type": "only concerns how TAO holds the json in memory",
    "dataset.augmentation.train_spatial_size": _TRAINING,
    "dataset.augmentation.multi_scales": _TRAINING,
    "dataset.augmentation.distortion_prob": _TRAINING,
    "dataset.augmentation.iou_crop_prob": _TRAINING,
    "evaluate.input_width": _SIZE,
    "evaluate.input_height": _SIZE,
    "inference.input_width": _SIZE,
    "inference.input_height": _SIZE,
    "inference.is_internal": "a folder layout that only NVIDIA uses",
}
"""Fields of TAO's spec that are accepted but not used, with the reason."""


@dataclass(frozen=True, kw_only=True)
class FrozenModelSpec:
    """The `model.frozen_fm:` section: in TAO, a frozen foundation model beside the backbone."""

    enabled: bool = option(
        False, "TAO's frozen C-RADIO branch; only false is supported, because no public library has it"
    )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The `model:` section. The defaults are those of TAO, and the RT-DETR-R50 of the paper (arXiv:2304.08069)."""

    architecture: str = option("rtdetr", "RT-DETR, or RT-DETRv2 (arXiv:2407.17140)", options=("rtdetr", "rtdetr_v2"))
    backbone: str = option(
        "resnet_50",
        "Backbone",
        options=BACKBONES,
        aliases={name.partition("_p4")[0].rpartition("_")[0]: name for name in _FANS},
    )
    checkpoint_key: str = option(
        "",
        "Keys that lead to the state dict in a checkpoint that has several, joined with dots: ema.module. Without it,"
        " averaged weights go first, and the log says what was taken",
        omit_default=True,
    )
    resnet: str = option(
        "auto",
        "Kind of ResNet: vd, that of RT-DETR's authors and of transformers; plain, that of TAO; auto takes it from the"
        " checkpoint, and vd without one",
        options=("auto", "vd", "plain"),
        omit_default=True,
    )
    backbone_args: JsonObject = option(
        dict,
        "Arguments that override those of the backbone: of transformers' RTDetrResNetConfig (hidden_sizes, depths, ...)"
        " or, for a backbone of TAO, of its constructor in timm",
    )
    args: JsonObject = option(
        dict, "Further arguments for transformers' RTDetrConfig, which take precedence over the fields of this section"
    )
    fuse: bool = option(
        True, "Fold batch norms and RepVGG branches into convolutions: same outputs, fewer layers, faster"
    )
    return_interm_indices: list[int] = option(
        lambda: [1, 2, 3], "Indices (from 0) of the backbone stages whose outputs the encoder takes"
    )
    num_feature_levels: int = option(3, "Number of feature maps that the decoder attends to", minimum=1)
    feat_strides: list[int] = option(lambda: [8, 16, 32], "Stride of each feature map, pixels")
    use_encoder_idx: list[int] = option(
        lambda: [2], "Indices (from 0) of the feature maps to which self-attention (AIFI) is applied"
    )
    hidden_dim: int = option(256, "Number of channels in encoder and decoder", minimum=1)
    nheads: int = option(8, "Number of attention heads", minimum=1)
    dim_feedforward: int = option(1024, "Number of hidden channels in feed-forward layers", minimum=1)
    enc_layers: int = option(1, "Number of self-attention layers of the encoder", minimum=0)
    dec_layers: int = option(6, "Number of decoder layers", minimum=1)
    eval_idx: int = option(
        -1, "Index (from 0) of the decoder layer that gives the outputs; -1 is the last; later layers are removed"
    )
    expansion: float = option(
        1.0, "Channels of the fusion blocks, as a multiple of hidden_dim; R18 and R34 networks have 0.5"
    )
    depth_mult: int = option(1, "Depth of the fusion blocks; only 1 is supported, as in transformers", minimum=1)
    enc_act: str = option("gelu", "Activation function of the encoder's feed-forward layers")
    act: str = option("silu", "Activation function of the fusion blocks")
    pe_temperature: int = option(10000, "Temperature of the position embedding", minimum=1)
    num_queries: int = option(300, "Number of object queries", minimum=1)
    num_select: int = option(
        300, "Number of detections per image: the highest scores among num_queries x num_classes", minimum=1
    )
    frozen_fm: FrozenModelSpec = option(FrozenModelSpec, "TAO's frozen foundation model")


def is_resnet(model: ModelSpec) -> bool:
    """Return whether a network has a ResNet, of either kind."""
    return model.backbone in RESNETS


def tao_network(model: ModelSpec) -> TaoNetwork:
    """Return the network of TAO that is the backbone."""
    if model.backbone == _CONVNEXT_V2_SMALL.name:
        return _CONVNEXT_V2_SMALL
    network = TAO_NETWORKS[_FANS.get(model.backbone, model.backbone)]
    if network.refused and network.nearest not in BACKBONES:
        return dataclasses.replace(network, nearest=_SMALLEST_EDGENEXT)
    return network


def is_tao(model: ModelSpec) -> bool:
    """Return whether a network is one of TAO's, which has another backbone than the networks of RT-DETR's authors."""
    return not is_resnet(model) or model.resnet == "plain"


@dataclass(frozen=True, kw_only=True)
class CocoSpec:
    """Images with COCO annotations."""

    image_dir: str = option("", "Folder of the images")
    json_file: str = option("", "COCO json; its file names are relative to image_dir")


@dataclass(frozen=True, kw_only=True)
class ImagesSpec:
    """Folders of images without annotations."""

    image_dir: list[str] = option(list, "Folders of images, or one folder", one_or_list=True)
    classmap: str = option("", "Text file with the class names, one per line")


@dataclass(frozen=True, kw_only=True)
class AugmentationSpec:
    """The fields of TAO's augmentation that evaluation uses, too."""

    eval_spatial_size: list[int] = option(
        lambda: [640, 640], "Height and width of the input, pixels; multiples of the largest stride"
    )
    preserve_aspect_ratio: bool = option(
        False, "Keep the aspect ratio of images and pad them with black to the right and below, instead of stretching"
    )
    preprocessing: str = option(
        "",
        "Take the fields above and below, where the spec does not write them, from the folder of the checkpoint:"
        " huggingface, or huggingface/FOLDER",
        pattern="|huggingface(/.+)?",
        omit_default=True,
    )
    interpolation: str = option("bilinear", "Interpolation of the resize", options=INTERPOLATIONS, omit_default=True)
    antialias: bool = option(
        True,
        "Antialias where images shrink, as Pillow does; false for networks that are fed by OpenCV's resize",
        omit_default=True,
    )


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The `dataset:` section."""

    val_data_sources: CocoSpec = option(
        CocoSpec, "Annotated images for evaluate, if test_data_sources is not given", one_or_list=True
    )
    test_data_sources: CocoSpec = option(CocoSpec, "Annotated images for evaluate", one_or_list=True)
    quant_calibration_data_sources: CocoSpec = option(
        CocoSpec,
        "Images for calibration: those named in the json, without one all in the folder; boxes are not needed",
        one_or_list=True,
    )
    infer_data_sources: ImagesSpec = option(ImagesSpec, "Images for inference", one_or_list=True)
    num_classes: int = option(
        80, "Number of outputs per query: the number of categories, or as in TAO at least the largest id + 1", minimum=1
    )
    category_ids: Plain = option(
        None,
        "What the outputs are: ordered, the categories in the order of their ids; as_ids, output k is category id k, as"
        " in TAO; or a list with the category id of each output, null for none. Needed if the annotations allow both",
        options=("ordered", "as_ids"),
        or_numbers=True,
        omit_default=True,
    )
    remap_mscoco_category: bool | None = option(
        None,
        "true: the outputs are COCO's 80 categories, whose ids go up to 90, in order, even if some are not annotated;"
        " false, if it is written: output k is category id k, where the annotations allow that",
        omit_default=True,
    )
    eval_class_ids: list[int] | None = option(None, "Category ids to evaluate; the default is all")
    batch_size: int = option(4, "Images per batch", minimum=1)
    workers: int = option(8, "Number of processes that read images; at most one per processor", minimum=0)
    augmentation: AugmentationSpec = option(AugmentationSpec, "How images are scaled to the input")


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluateSpec(EvaluateSpec):
    """The `evaluate:` section."""

    conf_threshold: float = option(
        0.0, "Smallest score of a detection that is evaluated, in 0..1; 0 for COCO's AP", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class DetectionInferenceSpec(InferenceSpec):
    """The `inference:` section."""

    conf_threshold: float = option(0.5, "Smallest score of a detection that is kept, in 0..1", minimum=0)
    color_map: dict[str, str] | None = option(None, "Colour of the boxes by class name: {car: red}")
    outline_width: int = option(3, "Width of the outline of boxes, pixels", minimum=1)


@dataclass(frozen=True, kw_only=True)
class RtdetrSpec(TaskSpec):
    """An rtdetr spec."""

    model: ModelSpec = option(ModelSpec, "The network")
    dataset: DatasetSpec = option(DatasetSpec, "The data")
    evaluate: DetectionEvaluateSpec = option(DetectionEvaluateSpec, "What to evaluate")
    inference: DetectionInferenceSpec = option(DetectionInferenceSpec, "What to run on new images")
