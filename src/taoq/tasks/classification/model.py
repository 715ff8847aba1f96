# SPDX-License-Identifier: Apache-2.0
"""Build a classifier by its name in TAO, timm or torchvision."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path

from torch import nn

from taoq.checkpoint import WithoutInitialisation
from taoq.errors import Fault, Notice, SpecError, TaoqError, first_line
from taoq.plain import JsonObject
from taoq.tasks.backbones.tao_names import OWN, TAO_NETWORKS
from taoq.tasks.classification.names import Source, check_size, find_network
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.classification.trial import run_once
from taoq.tasks.classification.weights import is_of_tao, load_weights

log = logging.getLogger(__name__)

_CHECKPOINT = "the checkpoint of the action"
_NOT_ARGUMENTS = {
    "num_classes": "dataset.num_classes",
    "pretrained": "model.backbone.pretrained",
    "weights": _CHECKPOINT,
    "weights_backbone": _CHECKPOINT,
    "checkpoint_path": _CHECKPOINT,  # timm would unpickle the file, which can run code
    "pretrained_cfg": _CHECKPOINT,
    "pretrained_cfg_overlay": _CHECKPOINT,
}
"""Arguments of the constructors that must not be given, with the part of the spec that decides them."""


def build_model(spec: ClassificationSpec, checkpoint: str | None, size_field: str = "dataset.img_size") -> nn.Module:
    """Build the float network of a spec, and run it once on a black image.

    Args:
        spec: The spec.
        checkpoint: The file with its weights; an empty string for the library's pretrained weights, which the spec must
            ask for; None for initial weights, where a backend loads the weights later.
        size_field: The field that sets the size of images, for messages.

    Raises:
        SpecError: If the name or an argument is wrong, if the network does not take images of this size, or if there is
            neither a checkpoint nor pretrained weights.
        TaoqError: If the checkpoint cannot be loaded or does not fit, or if pretrained weights cannot be downloaded.
    """
    backbone = spec.model.backbone
    if spec.model.head.binary:
        raise SpecError(Fault("model.head.binary", "no library has TAO's one-output head", "train with two classes"))
    if checkpoint == "" and not backbone.pretrained:
        hint = "give the checkpoint in the action's section, or set model.backbone.pretrained: true"
        raise SpecError(
            Fault(
                "model.backbone.pretrained",
                "no checkpoint is given, and pretrained weights are not asked for",
                hint,
            )
        )
    if checkpoint:
        spec = with_checkpoint(spec, checkpoint)
    source = find_network(spec.model.backbone)
    check_size(spec.model.backbone, spec.dataset.img_size, size_field)
    with WithoutInitialisation() if checkpoint else contextlib.nullcontext():
        model = _create(source, spec, pretrained=checkpoint == "")
    if checkpoint:
        load_weights(model, source, checkpoint, spec.model.checkpoint_key)
    run_once(model, spec.dataset.img_size, size_field, source, lambda more: _create(source, _with_args(spec, more)))
    return model


def _with_args(spec: ClassificationSpec, more: JsonObject) -> ClassificationSpec:
    backbone = spec.model.backbone
    backbone = dataclasses.replace(backbone, args={**backbone.args, **more})
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, backbone=backbone))


def with_checkpoint(spec: ClassificationSpec, checkpoint: str) -> ClassificationSpec:
    """Return the spec with what a checkpoint shows about its network: whether it is TAO's or timm's of the same name.

    Args:
        spec: The spec.
        checkpoint: A file.

    Raises:
        TaoqError: If the file cannot be read.
    """
    backbone = spec.model.backbone
    network = TAO_NETWORKS.get(backbone.type)
    if network is None or backbone.variant != "auto" or not network.two_variants:
        return spec
    if not Path(checkpoint).is_file() or not is_of_tao(network, checkpoint, spec.model.checkpoint_key):
        return spec
    log.info(Notice("model.backbone.variant", f"tao: {checkpoint} has TAO's {network.name}, which differs from timm's"))
    backbone = dataclasses.replace(backbone, variant="tao")
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, backbone=backbone))


def _create(source: Source, spec: ClassificationSpec, *, pretrained: bool = False) -> nn.Module:
    arguments: JsonObject = dict(spec.model.backbone.args)
    faults = [
        Fault(f"model.backbone.args.{key}", f"the network gets it from {where}", "take it out of the arguments")
        for key, where in _NOT_ARGUMENTS.items()
        if key in arguments
    ]
    if faults:
        raise SpecError(*faults)
    library, name = source.library, source.name
    if pretrained and source.as_tao:
        what = f"no library has pretrained weights of TAO's {spec.model.backbone.type}"
        raise SpecError(Fault("model.backbone.pretrained", what, "give TAO's checkpoint in the action's section"))
    try:
        if source.as_tao:
            return _create_tao(source, spec, arguments)
        return _create_library(library, name, spec.dataset.num_classes, arguments, pretrained=pretrained)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        what = f"{library} cannot build {name}: {first_line(error)}"
        if pretrained:
            raise TaoqError(
                Fault("model.backbone.pretrained", what, "download the weights where there is a network")
            ) from error
        hint = (
            f"see the constructor of {name} in {library}"
            if library != OWN
            else "see the arguments of FAN in docs/tao-backbones.md"
        )
        raise SpecError(Fault("model.backbone.args", what, hint)) from error
    except OSError as error:  # the download, or the cache of the hub
        what = f"the pretrained weights of {name} cannot be downloaded: {first_line(error)}"
        raise TaoqError(Fault("model.backbone.pretrained", what, "give a checkpoint file instead")) from error


def _create_tao(source: Source, spec: ClassificationSpec, arguments: JsonObject) -> nn.Module:
    from taoq.tasks.backbones.networks import create_network

    assert source.tao is not None
    return create_network(source.tao, spec.dataset.num_classes, spec.dataset.img_size, arguments)


def _create_library(library: str, name: str, num_classes: int, arguments: JsonObject, *, pretrained: bool) -> nn.Module:
    import timm
    import torchvision

    if library == "timm":
        if pretrained and timm.get_pretrained_cfg(name) is not None:
            _check_pretrained_classes(timm.get_pretrained_cfg(name).num_classes, num_classes)
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
        return model
    if pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        _check_pretrained_classes(len(weights.meta["categories"]), num_classes)
        model = torchvision.models.get_model(name, weights=weights, **arguments)
    else:
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **arguments)
    return model


def _check_pretrained_classes(pretrained_classes: int, num_classes: int) -> None:
    if pretrained_classes != num_classes:
        what = f"the pretrained weights have {pretrained_classes} classes, dataset.num_classes is {num_classes}"
        raise SpecError(Fault("dataset.num_classes", what, "give a checkpoint trained on your classes"))
