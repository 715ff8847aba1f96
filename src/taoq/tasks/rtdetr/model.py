# SPDX-License-Identifier: Apache-2.0
"""Build an RT-DETR from the fields of TAO, and load checkpoints of transformers and of the original code."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from taoq.checkpoint import WithoutInitialisation, load_state, read_state_dict, without_prefix
from taoq.errors import Fault, NotGiven, Notice, SpecError, TaoqError, did_you_mean
from taoq.plain import JsonObject
from taoq.tasks.rtdetr.names import from_hub, from_original, is_original
from taoq.tasks.rtdetr.spec import RtdetrSpec

log = logging.getLogger(__name__)

_BACKBONES: dict[str, JsonObject] = {
    "resnet_18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "resnet_34": {"layer_type": "basic", "depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512]},
    "resnet_50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
    "resnet_101": {"layer_type": "bottleneck", "depths": [3, 4, 23, 3], "hidden_sizes": [256, 512, 1024, 2048]},
}
_NUM_STAGES = 4
"""Number of stages of a ResNet."""

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

_FIT_HINT = "check model.backbone, the other fields of model and dataset.num_classes"
_PROJECTION = re.compile(r"encoder_input_proj\.0\.|encoder\.input_proj\.0\.")
"""Matches names of tensors that every RT-DETR has, in transformers and in the original code."""

_COMPARED = ("layer_norm_eps", "batch_norm_eps", "decoder_n_points", "decoder_activation_function", "normalize_before",
             "learn_initial_query", "decoder_offset_scale", "decoder_method")  # fmt: skip
"""Arguments besides `_FIELDS` that must be the same in a checkpoint's config.json as in the spec."""
_COMPARED_BACKBONE = ("embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act",
                      "downsample_in_first_stage", "downsample_in_bottleneck")  # fmt: skip
"""The same for arguments of the backbone's config."""


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
    config = make_config(spec)
    columns_first = False
    if checkpoint is None:
        model = _create(config)
    else:
        if Path(checkpoint).is_dir():
            _check_config(Path(checkpoint), config)
        with WithoutInitialisation():
            model = _create(config)
        columns_first = _load(model, checkpoint)  # The order of position embeddings in the original code.
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
    if model.frozen_fm.enabled:
        what = "no library has TAO's frozen foundation model"
        faults.append(Fault("model.frozen_fm.enabled", what, "use a network without it"))
    if len(model.feat_strides) != model.num_feature_levels:
        what = f"{model.feat_strides} are {len(model.feat_strides)} strides for {model.num_feature_levels} feature maps"
        faults.append(Fault("model.feat_strides", what, "write one stride for each of model.num_feature_levels"))
    levels = len(model.return_interm_indices)
    if not levels or any(not 0 <= index < _NUM_STAGES for index in model.return_interm_indices):
        what = f"{model.return_interm_indices} are not stages of the backbone"
        faults.append(
            Fault("model.return_interm_indices", what, f"write numbers from 0 to {_NUM_STAGES - 1}, [1, 2, 3]")
        )
    if any(not 0 <= index < levels for index in model.use_encoder_idx):
        what = f"{model.use_encoder_idx} is not below {levels}, the number of model.return_interm_indices"
        faults.append(Fault("model.use_encoder_idx", what, f"write [{levels - 1}]"))
    if faults:
        raise SpecError(*faults)


def make_config(spec: RtdetrSpec) -> Any:
    """Return the config of transformers for a spec, an RTDetrConfig or RTDetrV2Config.

    Raises:
        SpecError: If an argument is unknown, is set by another field, or is refused by transformers.
    """
    import transformers

    model = spec.model
    config_class: Any = transformers.RTDetrConfig if model.architecture == "rtdetr" else transformers.RTDetrV2Config
    backbone_class: Any = transformers.RTDetrResNetConfig
    backbone = _BACKBONES[model.backbone] | {"out_indices": [index + 1 for index in model.return_interm_indices]}
    backbone |= _checked(model.backbone_args, backbone_class, "model.backbone_args")
    arguments = {name: attrgetter(field)(spec) for name, field in _FIELDS.items()}
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


def _create(config: Any) -> nn.Module:
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


def _load(model: nn.Module, checkpoint: str) -> bool:
    """Load the weights of a network. Return whether the checkpoint is one of the original code."""
    path = Path(checkpoint)
    state = read_state_dict(str(path / "model.safetensors") if path.is_dir() else checkpoint)
    if not any(_PROJECTION.search(name) for name in state):
        what = (
            "is not the checkpoint of an RT-DETR: its names are neither those of transformers nor the original code's"
        )
        raise TaoqError(Fault(checkpoint, what, "give the checkpoint of an RT-DETR"))
    named = nn.ModuleDict({"model": model})
    original = is_original(state)
    unused: list[str] = []
    if original:
        state = without_prefix(state, "decoder.dec_score_head.0.weight")
        state = _without_batch_counts(state, "backbone.")
        state, unused = from_original(state, named.state_dict())
    else:
        state = from_hub(without_prefix(state, "model.encoder_input_proj.0.0.weight"))
        state = _without_batch_counts(state, "model.backbone.")
        unused = [key for key in state if key.startswith("model.denoising_class_embed.")]
        state = {key: value for key, value in state.items() if key not in unused}
    if unused:
        log.info(Notice(checkpoint, f"not needed for inference: {', '.join(unused)}"))
    load_state(named, state, checkpoint, _FIT_HINT)
    return original


def _without_batch_counts(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Leave out the batch counts of the backbone's batch norms, which transformers' frozen batch norms do not have."""
    return {
        key: value
        for key, value in state.items()
        if not (key.startswith(prefix) and key.endswith(".num_batches_tracked"))
    }


def _check_config(folder: Path, config: Any) -> None:
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
