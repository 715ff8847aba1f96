# SPDX-License-Identifier: Apache-2.0
"""Build an RT-DETR from TAO's fields, with the weights of a Hugging Face folder, an original file, or our own."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

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
_STAGES = 4
"""Of a ResNet."""
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
"""Field of the spec behind each argument of transformers' config; any other argument is in `model.args`."""
_HINT = "check model.backbone, the other fields of model and dataset.num_classes"
_PROJECTION = re.compile(r"encoder_input_proj\.0\.|encoder\.input_proj\.0\.")
"""A tensor that every RT-DETR has, in transformers and in the original code."""
_SAME = ("layer_norm_eps", "batch_norm_eps", "decoder_n_points", "decoder_activation_function", "normalize_before",
         "learn_initial_query", "decoder_offset_scale", "decoder_method")  # fmt: skip
_SAME_BACKBONE = ("embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act", "downsample_in_first_stage",
                  "downsample_in_bottleneck")  # fmt: skip


def build_model(spec: RtdetrSpec, checkpoint: str | None) -> nn.Module:
    """The float network of a spec, for its input size.

    Args:
        spec: The spec.
        checkpoint: A Hugging Face folder or a file; None leaves the network as initialised, for a backend that loads
            the weights itself.

    Raises:
        SpecError: The fields do not make a network, or no checkpoint is given.
        TaoqError: The checkpoint does not load, or does not fit.
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
        columns_first = _load(model, checkpoint)
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
    """Height and width of the input, pixels.

    Raises:
        SpecError: They, or other fields of the spec, do not fit.
    """
    check_spec(spec)
    height, width = spec.dataset.augmentation.eval_spatial_size
    return height, width


def check_spec(spec: RtdetrSpec) -> None:
    """Check what of a spec needs no library.

    Raises:
        SpecError: With every fault.
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
        what = f"{model.eval_idx} is no layer of {model.dec_layers}"
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
    if not levels or any(not 0 <= index < _STAGES for index in model.return_interm_indices):
        what = f"{model.return_interm_indices} are not stages of the backbone"
        faults.append(Fault("model.return_interm_indices", what, f"write numbers from 0 to {_STAGES - 1}, [1, 2, 3]"))
    if any(not 0 <= index < levels for index in model.use_encoder_idx):
        what = f"{model.use_encoder_idx} is not below {levels}, the number of model.return_interm_indices"
        faults.append(Fault("model.use_encoder_idx", what, f"write [{levels - 1}]"))
    if faults:
        raise SpecError(*faults)


def make_config(spec: RtdetrSpec) -> Any:
    """The config of transformers for a spec.

    Raises:
        SpecError: An argument is unknown, or transformers refuses one.
    """
    import transformers

    model = spec.model
    kind: Any = transformers.RTDetrConfig if model.architecture == "rtdetr" else transformers.RTDetrV2Config
    backbone_kind: Any = transformers.RTDetrResNetConfig
    backbone = _BACKBONES[model.backbone] | {"out_indices": [index + 1 for index in model.return_interm_indices]}
    backbone |= _checked(model.backbone_args, backbone_kind, "model.backbone_args")
    arguments = {name: attrgetter(field)(spec) for name, field in _FIELDS.items()}
    arguments["num_denoising"] = 0  # of training
    if model.architecture == "rtdetr_v2":
        arguments["decoder_n_levels"] = model.num_feature_levels
    own = _checked(model.args, kind, "model.args")
    faults = [
        Fault(f"model.args.{name}", f"is what {_FIELDS[name]} says", f"write {_FIELDS[name]} instead")
        for name in own
        if name in _FIELDS and not name.startswith(("encoder_", "decoder_", "d_model"))
    ]
    if faults:
        raise SpecError(*faults)
    arguments |= own
    try:
        sizes = [backbone["hidden_sizes"][index] for index in model.return_interm_indices]
        inside = {
            "encoder_in_channels": sizes,
            "decoder_in_channels": [arguments["encoder_hidden_dim"]] * len(sizes),
            "backbone_config": backbone_kind(**backbone),
        }
        return kind(**inside, **arguments)
    except Exception as error:  # transformers validates with exceptions of its own and of others
        what = f"transformers cannot make this network: {_one_line(error)}"
        raise SpecError(Fault("model", what, "check the fields of model")) from error


def _checked(arguments: JsonObject, kind: Any, where: str) -> JsonObject:
    known = {field.name for field in dataclasses.fields(kind)}
    faults = [
        Fault(f"{where}.{name}", f"{kind.__name__} has no argument '{name}'", did_you_mean(name, known, "see its page"))
        for name in arguments
        if name not in known
    ]
    if faults:
        raise SpecError(*faults)
    return dict(arguments)


def _create(config: Any) -> nn.Module:
    """The network below the names `model.*`, with its heads."""
    from transformers import RTDetrForObjectDetection, RTDetrV2ForObjectDetection

    kind = RTDetrForObjectDetection if config.model_type == "rt_detr" else RTDetrV2ForObjectDetection
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You'd better set embed_dim")  # for the authors' CUDA code
            model: nn.Module = kind(config).model
        return model
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AssertionError, ZeroDivisionError) as error:
        what = f"transformers cannot make this network: {_one_line(error)}"
        raise SpecError(Fault("model", what, "check the fields of model")) from error


def _load(model: nn.Module, checkpoint: str) -> bool:
    """Load every tensor of a network. Returns whether the checkpoint is of the original code."""
    path = Path(checkpoint)
    state = read_state_dict(str(path / "model.safetensors") if path.is_dir() else checkpoint)
    if not any(_PROJECTION.search(name) for name in state):
        what = (
            "is not the checkpoint of an RT-DETR: its names are neither those of transformers nor the original code's"
        )
        raise TaoqError(Fault(checkpoint, what, "give the checkpoint of an RT-DETR"))
    named = nn.ModuleDict({"model": model})
    own = named.state_dict()
    original = is_original(state)
    unused: list[str] = []
    if original:
        state = without_prefix(state, "decoder.dec_score_head.0.weight")
        # frozen batch norms, as we have in the backbone, do not count batches
        state = {key: value for key, value in state.items() if not _counts_batches(key, "backbone.")}
        state, unused = from_original(state, own)
    else:
        state = from_hub(without_prefix(state, "model.encoder_input_proj.0.0.weight"))
        state = {key: value for key, value in state.items() if not _counts_batches(key, "model.backbone.")}
        unused = [key for key in state if key.startswith("model.denoising_class_embed.")]
        state = {key: value for key, value in state.items() if key not in unused}
    if unused:
        log.info(Notice(checkpoint, f"not needed for inference: {', '.join(unused)}"))
    load_state(named, state, checkpoint, _HINT)
    return original


def _counts_batches(key: str, backbone: str) -> bool:
    return key.startswith(backbone) and key.endswith(".num_batches_tracked")


def _check_config(folder: Path, config: Any) -> None:
    """Compare a Hugging Face folder's config.json with what the spec makes.

    Raises:
        TaoqError: It is missing or of another kind of network.
        SpecError: They differ; with the field and the value to write.
    """
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        what = "is missing or not readable: not a Hugging Face folder"
        raise TaoqError(Fault(str(path), what, "give the folder with config.json and model.safetensors")) from None
    kind = stored.get("model_type") if isinstance(stored, dict) else None
    backbone = stored.get("backbone_config") if isinstance(stored, dict) else None
    if kind not in ("rt_detr", "rt_detr_v2"):
        what = f"its model_type is {kind}, not rt_detr or rt_detr_v2"
        raise TaoqError(Fault(str(path), what, "give the folder of an RT-DETR"))
    if kind != config.model_type:
        name = kind.replace("rt_detr", "rtdetr")
        raise SpecError(Fault("model.architecture", f"{path} has {kind}", f"write model.architecture: {name}"))
    if not isinstance(backbone, dict) or backbone.get("model_type") != "rt_detr_resnet":
        what = "its backbone is not transformers' rt_detr_resnet"
        raise TaoqError(Fault(str(path), what, f"backbones that work are {', '.join(_BACKBONES)}"))
    names, count = stored.get("id2label"), stored.get("num_labels", 2)
    stored["num_labels"] = len(names) if isinstance(names, dict) and names else count
    if not isinstance(stored["num_labels"], int):
        what = "has neither id2label nor num_labels, so it does not say how many classes there are"
        raise TaoqError(Fault(str(path), what, "copy the file again"))
    mine = config.to_dict()
    mine["num_labels"] = config.num_labels
    theirs = mine | stored  # a config may leave out what is the default
    faults: list[Fault] = []
    for name in (*_FIELDS, *_SAME):
        if name in mine and _plain(mine[name]) != _plain(theirs[name]):
            field = _FIELDS.get(name, f"model.args.{name}")
            what = f"{path} has {name} {_plain(theirs[name])}, the spec makes it {_plain(mine[name])}"
            hint = f"write {field}: {json.dumps(_plain(theirs[name]))}"
            if any(fault.hint == hint for fault in faults):
                continue  # one field of the spec is two arguments
            if any(fault.where == field for fault in faults):
                field = f"model.args.{name}"
                hint = f"write {field}: {json.dumps(_plain(theirs[name]))}"
            faults.append(Fault(field, what, hint))
    own = config.backbone_config.to_dict()
    for name in _SAME_BACKBONE:
        value = backbone.get(name, own[name])
        if _plain(own[name]) != _plain(value):
            what = f"{path} has {name} {_plain(value)}, the spec makes it {_plain(own[name])}"
            hint = f"write model.backbone_args.{name}: {json.dumps(_plain(value))}, or choose the model.backbone"
            faults.append(Fault(f"model.backbone_args.{name}", what, hint))
    if faults:
        raise SpecError(*faults)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
