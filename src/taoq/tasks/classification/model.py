# SPDX-License-Identifier: Apache-2.0
"""Build a classifier from timm or torchvision by its name."""

from __future__ import annotations

import contextlib
import re

from torch import nn

from taoq.checkpoint import WithoutInitialisation, load_weights
from taoq.errors import Fault, SpecError, TaoqError, did_you_mean, first_line
from taoq.plain import JsonObject
from taoq.tasks.classification.spec import ClassificationSpec

_TAO_NAMES = (
    (r"resnet_(\d+d?)", r"resnet\1"),
    (r"vit_(tiny|small|base|large|huge|giant)_patch(\d+)", r"vit_\1_patch\2_224"),
    (r"gc_vit_(\w+)", r"gcvit_\1"),
    (r"hiera_(tiny|small|base|base_plus|large|huge)", r"hiera_\1_224"),
)
"""Patterns of names in TAO that differ in timm, with the timm name. Names of other families (convnext_*, swin_*,
efficientvit_*, edgenext_*) are the same in both."""

_FIT_HINT = "check model.backbone.type, model.backbone.args and dataset.num_classes"
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


def build_model(spec: ClassificationSpec, checkpoint: str | None) -> nn.Module:
    """Build the float network of a spec.

    Args:
        spec: The spec.
        checkpoint: The file with its weights; an empty string for the library's pretrained weights, which the spec must
            ask for; None for initial weights, where a backend loads the weights later.

    Raises:
        SpecError: If the name or an argument is wrong, or if there is neither a checkpoint nor pretrained weights.
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
    library, name = _library_and_name(backbone.type)
    with WithoutInitialisation() if checkpoint else contextlib.nullcontext():
        model = _create(library, name, spec, pretrained=checkpoint == "")
    if checkpoint:
        load_weights(model, checkpoint, _FIT_HINT)
    return model


def _library_and_name(type_: str) -> tuple[str, str]:
    """Find the library of a network, and its name there."""
    where = "model.backbone.type"
    if not type_:
        raise SpecError(Fault(where, "missing: which network is it?", "write a name, for example resnet_50"))
    import timm
    import torchvision

    prefix, _, name = type_.rpartition("/")
    candidates = [name]
    for pattern, replacement in _TAO_NAMES:
        if re.fullmatch(pattern, name):
            candidates.append(re.sub(pattern, replacement, name))
    networks = {"timm": timm.list_models(), "torchvision": torchvision.models.list_models(torchvision.models)}
    if prefix and prefix not in networks:
        raise SpecError(Fault(where, f"unknown library '{prefix}'", "write timm/NAME or torchvision/NAME"))
    for library in [prefix] if prefix else networks:
        for candidate in candidates:
            # A timm name may end in a tag of pretrained weights: resnet50.a1_in1k.
            if candidate.partition(".")[0] in networks[library]:
                return library, candidate
    names = [*networks["timm"], *networks["torchvision"], "resnet_50", "resnet_18", "vit_base_patch16"]
    otherwise = "any timm or torchvision name works, and TAO's where these have the network"
    raise SpecError(Fault(where, f"no library has a network '{type_}'", did_you_mean(name, names, otherwise)))


def _create(library: str, name: str, spec: ClassificationSpec, *, pretrained: bool) -> nn.Module:
    import timm
    import torchvision

    arguments: JsonObject = dict(spec.model.backbone.args)
    faults = [
        Fault(f"model.backbone.args.{key}", f"the network gets it from {source}", "take it out of the arguments")
        for key, source in _NOT_ARGUMENTS.items()
        if key in arguments
    ]
    if faults:
        raise SpecError(*faults)
    classes = spec.dataset.num_classes
    try:
        if library == "timm":
            if pretrained and timm.get_pretrained_cfg(name) is not None:
                _check_pretrained_classes(timm.get_pretrained_cfg(name).num_classes, classes)
            model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=classes, **arguments)
            return model
        if pretrained:
            weights = torchvision.models.get_model_weights(name).DEFAULT
            _check_pretrained_classes(len(weights.meta["categories"]), classes)
            model = torchvision.models.get_model(name, weights=weights, **arguments)
        else:
            model = torchvision.models.get_model(name, weights=None, num_classes=classes, **arguments)
        return model
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        what = f"{library} cannot build {name}: {first_line(error)}"
        if pretrained:
            raise TaoqError(
                Fault("model.backbone.pretrained", what, "download the weights where there is a network")
            ) from error
        hint = f"see the constructor of {name} in {library}"
        raise SpecError(Fault("model.backbone.args", what, hint)) from error
    except OSError as error:  # the download, or the cache of the hub
        what = f"the pretrained weights of {name} cannot be downloaded: {first_line(error)}"
        raise TaoqError(Fault("model.backbone.pretrained", what, "give a checkpoint file instead")) from error


def _check_pretrained_classes(pretrained_classes: int, num_classes: int) -> None:
    if pretrained_classes != num_classes:
        what = f"the pretrained weights have {pretrained_classes} classes, dataset.num_classes is {num_classes}"
        raise SpecError(Fault("dataset.num_classes", what, "give a checkpoint trained on your classes"))
