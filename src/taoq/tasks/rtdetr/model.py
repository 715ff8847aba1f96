# SPDX-License-Identifier: Apache-2.0
"""Build an RT-DETR from the fields of TAO."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, cast

from torch import nn

from taoq.checkpoint import WithoutInitialisation
from taoq.errors import Fault, NotGiven, Notice, SpecError
from taoq.tasks.rtdetr.config import NUM_STAGES, TAO_DECODER, check_config, create_network, make_config
from taoq.tasks.rtdetr.spec import RESNETS, UPSAMPLE, RtdetrSpec, is_resnet, is_tao, tao_network
from taoq.tasks.rtdetr.weights import is_widened, load_network, resnet_of

log = logging.getLogger(__name__)


def build_model(spec: RtdetrSpec, checkpoint: str | None) -> nn.Module:
    """Build the float network of a spec, for its input size.

    Args:
        spec: The spec.
        checkpoint: A Hugging Face folder, or a file; None for initial weights, where a backend loads the weights later;
            an empty string if the user gave none, which is an error.

    Raises:
        SpecError: If the spec does not define a network, if it differs from the checkpoint's config.json, or if no
            checkpoint is given.
        TaoqError: If the checkpoint cannot be loaded, or does not fit the network.
    """
    from taoq.tasks.rtdetr.network import Detector, fuse

    size = input_size(spec)
    if checkpoint == "":
        hint = "write quantize.model_path, evaluate.checkpoint or inference.checkpoint: a Hugging Face folder or a file"
        raise NotGiven(Fault("model", "no checkpoint is given", hint))
    if checkpoint:
        spec = with_checkpoint(spec, checkpoint)
    columns_first = False
    if checkpoint is None:
        model = _create(spec)
    else:
        if Path(checkpoint).is_dir():
            _refuse_tao_backbone(spec, checkpoint)
            check_config(Path(checkpoint), make_config(spec))
        with WithoutInitialisation():
            model = _create(spec)
        columns_first = load_network(
            model, checkpoint, spec.model.checkpoint_key
        )  # The order of position embeddings in the original code.
        _say_assumptions(spec, original=columns_first)
    detector = Detector(
        model,
        size,
        spec.model.feat_strides,
        spec.model.eval_idx % spec.model.dec_layers + 1,
        columns_first=columns_first,
    )
    if spec.model.fuse:
        fuse(detector)
    return detector.eval().requires_grad_(False)


def _refuse_tao_backbone(spec: RtdetrSpec, folder: str) -> None:
    """Refuse a spec whose backbone is TAO's, with a folder of Hugging Face."""
    what = f"and {folder} is a folder of Hugging Face, whose network has a ResNet-vd"
    if not is_resnet(spec.model):
        hint = f"give a checkpoint of TAO, or write one of {', '.join(RESNETS)}"
        raise SpecError(Fault("model.backbone", f"is {spec.model.backbone}, {what}", hint))
    if is_tao(spec.model):
        raise SpecError(Fault("model.resnet", f"is {spec.model.resnet}, {what}", "leave it out"))


def _say_assumptions(spec: RtdetrSpec, *, original: bool) -> None:
    """Log what a checkpoint does not say about its network."""
    model = spec.model
    for field, argument in (("nheads", "decoder_attention_heads"), ("dim_feedforward", "decoder_ffn_dim")):
        own, tao = getattr(model, field), TAO_DECODER[argument]
        if is_tao(model) and own != tao and argument not in model.args:
            what = f"{own} is for the encoder only: TAO's decoder always has {tao}"
            log.info(Notice(f"model.{field}", what))
    if original and model.architecture == "rtdetr_v2" and "decoder_method" not in model.args:
        what = "default (bilinear sampling) is assumed, because the file does not say it; *_dsp networks have discrete"
        log.info(Notice("model.args.decoder_method", what))


def _create(spec: RtdetrSpec) -> nn.Module:
    """Build the network of a spec, with the backbone that it names."""
    if not is_tao(spec.model):
        return create_network(make_config(spec))
    from taoq.tasks.rtdetr.backbones import create_backbone

    backbone = create_backbone(spec.model)
    model = create_network(make_config(spec, backbone.channels))
    cast(Any, model).backbone.model = backbone
    return model


def with_checkpoint(spec: RtdetrSpec, checkpoint: str) -> RtdetrSpec:
    """Return the spec with what a checkpoint shows about its network: which of two networks of one name it has.

    Args:
        spec: The spec.
        checkpoint: A Hugging Face folder, or a file.

    Raises:
        TaoqError: If the checkpoint is a file that cannot be read.
    """
    model = spec.model
    if not Path(checkpoint).is_file():
        return spec
    if is_resnet(model) and model.resnet == "auto" and resnet_of(checkpoint, model.checkpoint_key) == "plain":
        log.info(Notice("model.resnet", f"plain: {checkpoint} has the ResNet of TAO, not that of RT-DETR's authors"))
        return dataclasses.replace(spec, model=dataclasses.replace(model, resnet="plain"))
    if (
        model.backbone.startswith("convnextv2_")
        and UPSAMPLE not in model.backbone_args
        and is_widened(checkpoint, model.checkpoint_key)
    ):
        log.info(Notice("model.backbone_args", f"{UPSAMPLE}: true: {checkpoint} has conv_512, as networks of TAO 6"))
        arguments = {**model.backbone_args, UPSAMPLE: True}
        return dataclasses.replace(spec, model=dataclasses.replace(model, backbone_args=arguments))
    return spec


def input_size(spec: RtdetrSpec) -> tuple[int, int]:
    """Return height and width of the input, pixels.

    Raises:
        SpecError: If the spec does not pass `check_spec`.
    """
    check_spec(spec)
    height, width = spec.dataset.augmentation.eval_spatial_size
    return height, width


def check_spec(spec: RtdetrSpec) -> None:
    """Check the fields of a spec that can be checked without transformers.

    Raises:
        SpecError: If any of them are wrong; lists every fault.
    """
    model = spec.model
    faults: list[Fault] = []
    size, where = spec.dataset.augmentation.eval_spatial_size, "dataset.augmentation.eval_spatial_size"
    stride = max(model.feat_strides, default=32)
    if len(size) != 2:
        faults.append(Fault(where, f"{size} is not a height and a width", "write two numbers, [640, 640]"))
    elif any(side < stride or side % stride for side in size):
        near = [max(stride, round(side / stride) * stride) for side in size]
        what = f"{size} does not fit the strides {model.feat_strides}: both must be multiples of {stride}"
        faults.append(Fault(where, what, f"write {near}"))
    if model.num_select > model.num_queries * spec.dataset.num_classes:
        most = model.num_queries * spec.dataset.num_classes
        what = f"{model.num_select} is more than {model.num_queries} queries x {spec.dataset.num_classes} classes"
        faults.append(Fault("model.num_select", what, f"write at most {most}"))
    if not -model.dec_layers <= model.eval_idx < model.dec_layers:
        what = f"{model.eval_idx} is not a layer of {model.dec_layers}"
        faults.append(Fault("model.eval_idx", what, "write -1 for the last layer"))
    if model.depth_mult != 1:
        what = f"{model.depth_mult}: transformers' fusion blocks have three RepVGG blocks, which is depth_mult 1"
        faults.append(Fault("model.depth_mult", what, "write 1, which all published RT-DETR networks have"))
    if not is_resnet(model) and (network := tao_network(model)).refused:
        what = f"taoq does not build {model.backbone}: {network.refused}"
        faults.append(Fault("model.backbone", what, f"the nearest one that it builds is {network.nearest}"))
    if model.frozen_fm.enabled:
        what = "no library has TAO's frozen foundation model"
        faults.append(Fault("model.frozen_fm.enabled", what, "use a network without it"))
    if len(model.feat_strides) != model.num_feature_levels:
        what = f"{model.feat_strides} are {len(model.feat_strides)} strides for {model.num_feature_levels} feature maps"
        faults.append(Fault("model.feat_strides", what, "write one stride for each of model.num_feature_levels"))
    levels = len(model.return_interm_indices)
    if not levels or any(not 0 <= index < NUM_STAGES for index in model.return_interm_indices):
        what = f"{model.return_interm_indices} are not stages of the backbone"
        faults.append(
            Fault("model.return_interm_indices", what, f"write numbers from 0 to {NUM_STAGES - 1}, [1, 2, 3]")
        )
    if any(not 0 <= index < levels for index in model.use_encoder_idx):
        what = f"{model.use_encoder_idx} is not below {levels}, the number of model.return_interm_indices"
        faults.append(Fault("model.use_encoder_idx", what, f"write [{levels - 1}]"))
    if faults:
        raise SpecError(*faults)
