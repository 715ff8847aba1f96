# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints of transformers, of the original code and of TAO into a network."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from taoq.checkpoint import load_state, read_names, read_state_dict, without_prefix
from taoq.errors import Fault, Notice, SpecError, TaoqError, abbreviated
from taoq.tasks.rtdetr.names import from_hub, from_original, is_original, original_name

log = logging.getLogger(__name__)

_FIT_HINT = "check model.backbone, the other fields of model and dataset.num_classes"
_PROJECTION = re.compile(r"encoder_input_proj\.0\.|encoder\.input_proj\.0\.")
"""Matches names of tensors that every RT-DETR has, in transformers and in the original code."""
_RESNETS = {"plain": "backbone.layer1.0.conv1.weight", "vd": "backbone.conv1.conv1_1.conv.weight"}
"""The name in TAO's or the original code of a tensor that only one kind of ResNet has."""
_OTHER_DETECTORS = {
    r"\blqe_layers\.": "D-FINE or DEIM",
    r"\bbackbone\.0\.encoder\.encoder\.|\bbackbone\.backbone\.embeddings\.mask_token$": "RF-DETR",
    r"\b(refpoint|reference_point)_embed\.": "LW-DETR",
    r"\b(transformer|model)\.level_embed$": "Deformable DETR or DINO",
    r"\bbackbone\.0\.body\.|\bmodel\.input_projection\.": "DETR",
    r"\bdetection_tokens$": "YOLOS",
    r"^((model|module)\.)*\d+\.(conv|cv1|stem1|dec_score_head)\b": "one of Ultralytics' networks",
}
"""Patterns on names of tensors that only another detector has, with its name."""
_NORM_EPSILON = 1e-5
"""Value that batch norms add to the variance, in the original code and by default in transformers."""
_DEPLOY = re.compile(r"(.*\.bottlenecks\.\d+)\.conv\.(weight|bias)")
"""Matches the tensors of a RepVGG block that `deploy()` of the original code made one convolution."""


def load_network(network: nn.Module, checkpoint: str, key: str) -> bool:
    """Load the weights of a network.

    Args:
        network: The network, in the layers of transformers.
        checkpoint: A Hugging Face folder, or a file.
        key: Value of model.checkpoint_key.

    Returns:
        Whether the checkpoint has the names of the original code, which TAO has, too.

    Raises:
        SpecError: If the checkpoint has the other kind of ResNet.
        TaoqError: If the checkpoint cannot be read, is that of another network, or does not fit.
    """
    path = Path(checkpoint)
    state = read_state_dict(str(path / "model.safetensors") if path.is_dir() else checkpoint, key)
    _refuse_other_detector(state, checkpoint)
    named = nn.ModuleDict({"model": network})
    original = is_original(state)
    unused: list[str] = []
    if original:
        state = without_prefix(state, "decoder.dec_score_head.0.weight")
        _refuse_other_resnet(state, network, checkpoint)
        state = _without_batch_counts(_two_branches(state), "backbone.")
        state, unused = _tao_backbone(state, cast(Any, network).backbone.model)
        state, training = from_original(state, named.state_dict())
        unused += training
    else:
        state = from_hub(without_prefix(state, "model.encoder_input_proj.0.0.weight"))
        state = _without_batch_counts(state, "model.backbone.")
        unused = [key for key in state if key.startswith("model.denoising_class_embed.")]
        state = _without(state, unused)
    if unused:
        log.info(Notice(checkpoint, f"not needed for inference: {abbreviated(unused)}"))
    load_state(named, state, checkpoint, _FIT_HINT)
    return original


def _tao_backbone(state: Mapping[str, Tensor], backbone: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of a backbone of TAO as its library has them; do nothing for any other backbone.

    Returns:
        All tensors, without those that the feature maps do not depend on; and the names of these.
    """
    from taoq.tasks.rtdetr.backbones import TaoBackbone

    if not isinstance(backbone, TaoBackbone):
        return dict(state), []
    prefix = "backbone."
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    renamed = backbone.from_tao(own)
    unused = sorted(backbone.not_needed & set(renamed))
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return rest | {prefix + name: tensor for name, tensor in renamed.items() if name not in unused}, unused


def resnet_of(checkpoint: str, key: str) -> str:
    """Return the kind of ResNet that a file has, plain or vd; an empty string for any other file.

    Raises:
        TaoqError: If the file cannot be read.
    """
    return _resnet_in(read_names(checkpoint, key))


def is_widened(checkpoint: str, key: str) -> bool:
    """Return whether a file has the convolutions that widen the feature maps of a ConvNeXt in TAO.

    Raises:
        TaoqError: If the file cannot be read.
    """
    return any(name.endswith("backbone.conv_512.weight") for name in read_names(checkpoint, key))


def _resnet_in(names: Collection[str]) -> str:
    return next((kind for kind, name in _RESNETS.items() if any(key.endswith(name) for key in names)), "")


def _refuse_other_detector(state: Mapping[str, Tensor], checkpoint: str) -> None:
    for pattern, name in _OTHER_DETECTORS.items():
        if any(re.search(pattern, key) for key in state):
            what = f"is a checkpoint of {name}, which taoq does not build"
            raise TaoqError(Fault(checkpoint, what, "give the checkpoint of an RT-DETR or RT-DETRv2"))
    if not any(_PROJECTION.search(name) for name in state):
        what = (
            "is not the checkpoint of an RT-DETR: its names are neither those of transformers nor the original code's"
        )
        raise TaoqError(Fault(checkpoint, what, "give the checkpoint of an RT-DETR"))


def _refuse_other_resnet(state: Mapping[str, Tensor], network: nn.Module, checkpoint: str) -> None:
    """Refuse a checkpoint with the other kind of ResNet than the spec names explicitly."""
    given = _resnet_in(state)
    expected = _resnet_in([original_name(f"model.{name}") for name in network.state_dict()])
    if given and expected and given != expected:
        what = f"is {expected}, but the ResNet of {checkpoint} is {given}"
        raise SpecError(Fault("model.resnet", what, "leave it out: it is seen from the checkpoint"))


def _two_branches(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which each RepVGG block has two branches again, the second of which is zero.

    The block computes the same: its batch norms change nothing but add the bias.
    """
    result = dict(state)
    blocks = {match[1] for name in state if (match := _DEPLOY.fullmatch(name))}
    for block in blocks:
        kernel, bias = result.pop(f"{block}.conv.weight"), result.pop(f"{block}.conv.bias")
        one = torch.ones_like(bias)
        for branch, weight, offset in (
            ("conv1", kernel, bias),
            ("conv2", torch.zeros_like(kernel[:, :, :1, :1]), torch.zeros_like(bias)),
        ):
            result[f"{block}.{branch}.conv.weight"] = weight
            result[f"{block}.{branch}.norm.weight"] = one
            result[f"{block}.{branch}.norm.bias"] = offset
            result[f"{block}.{branch}.norm.running_mean"] = torch.zeros_like(bias)
            result[f"{block}.{branch}.norm.running_var"] = one - _NORM_EPSILON
            result[f"{block}.{branch}.norm.num_batches_tracked"] = torch.tensor(0)
    return result


def _without(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


def _without_batch_counts(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Leave out the batch counts of the backbone's batch norms, which transformers' frozen batch norms do not have."""
    return {
        key: value
        for key, value in state.items()
        if not (key.startswith(prefix) and key.endswith(".num_batches_tracked"))
    }
