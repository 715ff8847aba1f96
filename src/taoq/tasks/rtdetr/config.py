# SPDX-License-Identifier: Apache-2.0
"""The config of transformers' RT-DETR for a spec, the network of a config, and the config.json of a folder."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from taoq.errors import Fault, SpecError, TaoqError, did_you_mean
from taoq.plain import JsonObject
from taoq.tasks.rtdetr.spec import RtdetrSpec, is_tao

_BACKBONES: dict[str, JsonObject] = {
    "resnet_18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "resnet_34": {"layer_type": "basic", "depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512]},
    "resnet_50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
    "resnet_101": {"layer_type": "bottleneck", "depths": [3, 4, 23, 3], "hidden_sizes": [256, 512, 1024, 2048]},
}

_FIELDS = {
    "encoder_hidden_dim": "model.hidden_dim",
    "d_model": "model.hidden_dim",
    "encoder_ffn_dim": "model.dim_feedforward",
    "decoder_ffn_dim": "model.dim_feedforward",
    "encoder_attention_heads": "model.nheads",
    "decoder_attention_heads": "model.nheads",
    "encoder_layers": "model.enc_layers",
    "decoder_layers": "model.dec_layers",
    "hidden_expansion": "model.expansion",
    "encoder_activation_function": "model.enc_act",
    "activation_function": "model.act",
    "positional_encoding_temperature": "model.pe_temperature",
    "encode_proj_layers": "model.use_encoder_idx",
    "feat_strides": "model.feat_strides",
    "num_feature_levels": "model.num_feature_levels",
    "num_queries": "model.num_queries",
    "num_labels": "dataset.num_classes",
}
"""The field of the spec that sets an argument of transformers' config; all other arguments are in `model.args`."""

NUM_STAGES = 4
"""Number of stages of a backbone."""
TAO_DECODER = {"decoder_ffn_dim": 1024, "decoder_attention_heads": 8}
"""Sizes of TAO's decoder. TAO does not take them from the spec: `nheads` and `dim_feedforward` are its encoder's."""

_COMPARED = ("layer_norm_eps", "batch_norm_eps", "decoder_n_points", "decoder_activation_function", "normalize_before",
             "learn_initial_query", "decoder_offset_scale", "decoder_method")  # fmt: skip
"""Arguments besides `_FIELDS` that must be the same in a checkpoint's config.json as in the spec."""
_COMPARED_BACKBONE = ("embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act",
                      "downsample_in_first_stage", "downsample_in_bottleneck")  # fmt: skip
"""The same for arguments of the backbone's config."""


def make_config(spec: RtdetrSpec, channels: Sequence[int] = ()) -> Any:
    """Return the config of transformers for a spec, an RTDetrConfig or RTDetrV2Config.

    Args:
        spec: The spec.
        channels: Channels of each feature map of a backbone that is not transformers' own; its place in the config is
            taken by the smallest ResNet with these channels.

    Raises:
        SpecError: If an argument is unknown, is set by another field, or is refused by transformers.
    """
    import transformers

    model = spec.model
    config_class: Any = transformers.RTDetrConfig if model.architecture == "rtdetr" else transformers.RTDetrV2Config
    backbone_class: Any = transformers.RTDetrResNetConfig
    if channels:
        backbone: JsonObject = {"embedding_size": 8, "hidden_sizes": [8] * NUM_STAGES, "depths": [1] * NUM_STAGES}
        for index, count in zip(model.return_interm_indices, channels, strict=True):
            backbone["hidden_sizes"][index] = count
    else:
        backbone = _BACKBONES[model.backbone] | _checked(model.backbone_args, backbone_class, "model.backbone_args")
    backbone["out_indices"] = [index + 1 for index in model.return_interm_indices]
    arguments = {name: attrgetter(field)(spec) for name, field in _FIELDS.items()}
    if is_tao(model):
        arguments |= TAO_DECODER
    arguments["num_denoising"] = 0  # Denoising is used only in training.
    if model.architecture == "rtdetr_v2":
        arguments["decoder_n_levels"] = model.num_feature_levels
    extra = _checked(model.args, config_class, "model.args")
    faults = [
        Fault(f"model.args.{name}", f"is what {_FIELDS[name]} says", f"write {_FIELDS[name]} instead")
        for name in extra
        if name in _FIELDS and not name.startswith(("encoder_", "decoder_", "d_model"))
    ]
    if faults:
        raise SpecError(*faults)
    arguments |= extra
    try:
        sizes = [backbone["hidden_sizes"][index] for index in model.return_interm_indices]
        derived = {
            "encoder_in_channels": sizes,
            "decoder_in_channels": [arguments["encoder_hidden_dim"]] * len(sizes),
            "backbone_config": backbone_class(**backbone),
        }
        return config_class(**derived, **arguments)
    except Exception as error:  # Validation in transformers raises exceptions of several libraries.
        what = f"transformers cannot make this network: {_one_line(error)}"
        raise SpecError(Fault("model", what, "check the fields of model")) from error


def _checked(arguments: JsonObject, config_class: Any, where: str) -> JsonObject:
    """Return a copy of arguments. Raise SpecError if the config class does not have one of them."""
    names = {field.name for field in dataclasses.fields(config_class)}
    faults = [
        Fault(
            f"{where}.{name}",
            f"{config_class.__name__} has no argument '{name}'",
            did_you_mean(name, names, "see its page"),
        )
        for name in arguments
        if name not in names
    ]
    if faults:
        raise SpecError(*faults)
    return dict(arguments)


def create_network(config: Any) -> nn.Module:
    """Build the network of a config, with its heads but without the outer module whose attribute `model` it is."""
    from transformers import RTDetrForObjectDetection, RTDetrV2ForObjectDetection

    network_class = RTDetrForObjectDetection if config.model_type == "rt_detr" else RTDetrV2ForObjectDetection
    try:
        with warnings.catch_warnings():
            # The warning is advice for CUDA code that is not used.
            warnings.filterwarnings("ignore", message="You'd better set embed_dim")
            model: nn.Module = network_class(config).model
        return model
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AssertionError, ZeroDivisionError) as error:
        what = f"transformers cannot make this network: {_one_line(error)}"
        raise SpecError(Fault("model", what, "check the fields of model")) from error


def check_config(folder: Path, config: Any) -> None:
    """Compare the config.json of a Hugging Face folder with the config of the spec.

    Raises:
        TaoqError: If the file cannot be read, or is not that of an RT-DETR with a supported backbone.
        SpecError: If they differ; lists every field to change, with its value.
    """
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        what = "is missing or not readable: not a Hugging Face folder"
        raise TaoqError(Fault(str(path), what, "give the folder with config.json and model.safetensors")) from None
    model_type = stored.get("model_type") if isinstance(stored, dict) else None
    backbone = stored.get("backbone_config") if isinstance(stored, dict) else None
    if model_type not in ("rt_detr", "rt_detr_v2"):
        what = f"its model_type is {model_type}, not rt_detr or rt_detr_v2"
        raise TaoqError(Fault(str(path), what, "give the folder of an RT-DETR"))
    if model_type != config.model_type:
        name = model_type.replace("rt_detr", "rtdetr")
        raise SpecError(Fault("model.architecture", f"{path} has {model_type}", f"write model.architecture: {name}"))
    if not isinstance(backbone, dict) or backbone.get("model_type") != "rt_detr_resnet":
        what = "its backbone is not transformers' rt_detr_resnet"
        raise TaoqError(Fault(str(path), what, f"backbones that work are {', '.join(_BACKBONES)}"))
    names, count = stored.get("id2label"), stored.get("num_labels", 2)
    stored["num_labels"] = len(names) if isinstance(names, dict) and names else count
    if not isinstance(stored["num_labels"], int):
        what = "has neither id2label nor num_labels, so it does not say how many classes there are"
        raise TaoqError(Fault(str(path), what, "copy the file again"))
    expected = config.to_dict() | {"num_labels": config.num_labels}
    faults = _differences(path, stored, expected)
    faults += _backbone_differences(path, backbone, config.backbone_config.to_dict())
    if faults:
        raise SpecError(*faults)


def _differences(path: Path, stored: JsonObject, expected: JsonObject) -> list[Fault]:
    expected = _lists(expected)
    values = expected | _lists(stored)  # A config.json may leave out arguments that have their default.
    faults: list[Fault] = []
    for name in (*_FIELDS, *_COMPARED):
        if name not in expected or expected[name] == values[name]:
            continue
        field = _FIELDS.get(name, f"model.args.{name}")
        what = f"{path} has {name} {values[name]}, the spec makes it {expected[name]}"
        hint = f"write {field}: {json.dumps(values[name])}"
        if any(fault.hint == hint for fault in faults):
            continue  # The field sets two arguments, and the fault of the first says the same.
        if any(fault.where == field for fault in faults):  # It sets two arguments that need different values.
            field = f"model.args.{name}"
            hint = f"write {field}: {json.dumps(values[name])}"
        faults.append(Fault(field, what, hint))
    return faults


def _backbone_differences(path: Path, stored: JsonObject, expected: JsonObject) -> list[Fault]:
    expected = _lists(expected)
    values = expected | _lists(stored)
    return [
        Fault(
            f"model.backbone_args.{name}",
            f"{path} has {name} {values[name]}, the spec makes it {expected[name]}",
            f"write model.backbone_args.{name}: {json.dumps(values[name])}, or choose the model.backbone",
        )
        for name in _COMPARED_BACKBONE
        if expected[name] != values[name]
    ]


def _lists(values: JsonObject) -> JsonObject:
    """Replace tuples by lists, as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _one_line(error: Exception) -> str:
    """Return the message of an exception in one line, or its class name if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
