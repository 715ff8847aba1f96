# SPDX-License-Identifier: Apache-2.0
"""Build a classifier by name from timm or torchvision."""

from __future__ import annotations

import contextlib
import re

from torch import nn

from taoq.checkpoint import WithoutInitialisation, load_weights
from taoq.errors import Fault, SpecError, TaoqError, did_you_mean
from taoq.plain import JsonObject
from taoq.tasks.classification.spec import ClassificationSpec

_TAO_NAMES = (
    (r"resnet_(\d+d?)", r"resnet\1"),
    (r"vit_(tiny|small|base|large|huge|giant)_patch(\d+)", r"vit_\1_patch\2_224"),
    (r"gc_vit_(\w+)", r"gcvit_\1"),
    (r"hiera_(tiny|small|base|base_plus|large|huge)", r"hiera_\1_224"),
)
"""TAO's names whose timm name differs; convnext_*, swin_*, efficientvit_*, edgenext_* are the same."""


_CHECK = "check model.backbone.type, model.backbone.args and dataset.num_classes"
_CHECKPOINT = "the checkpoint of the action"
_NOT_ARGUMENTS = {
    "num_classes": "dataset.num_classes",
    "pretrained": "model.backbone.pretrained",
    "weights": _CHECKPOINT,
    "weights_backbone": _CHECKPOINT,
    "checkpoint_path": _CHECKPOINT,  # timm would unpickle it
    "pretrained_cfg": _CHECKPOINT,
    "pretrained_cfg_overlay": _CHECKPOINT,
}
"""Arguments of the constructors that come from elsewhere in the spec."""


def build_model(spec: ClassificationSpec, checkpoint: str | None) -> nn.Module:
    """The float network of a spec.

    Args:
        spec: The spec.
        checkpoint: Its weights; empty takes the library's pretrained ones if the spec asks for them;
            None leaves the network as initialised, for a backend that loads the weights itself.

    Raises:
        SpecError: Unknown name, wrong arguments, or neither a checkpoint nor pretrained weights.
        TaoqError: The checkpoint does not load, or does not fit.
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
    library, name = _find(backbone.type)
    pretrained = checkpoint == ""
    with WithoutInitialisation() if checkpoint else contextlib.nullcontext():
        model = _create(library, name, spec, pretrained=pretrained)
    if checkpoint:
        load_weights(model, checkpoint, _CHECK)
    return model


def _find(type_: str) -> tuple[str, str]:
    """Library and name of a network."""
    where = "model.backbone.type"
    if not type_:
        raise SpecError(Fault(where, "missing: which network is it?", "write a name, for example resnet_50"))
    import timm
    import torchvision

    library, _, bare = type_.rpartition("/")
    candidates = [bare]
    for pattern, replacement in _TAO_NAMES:
        if re.fullmatch(pattern, bare):
            candidates.append(re.sub(pattern, replacement, bare))
    lists = {"timm": timm.list_models(), "torchvision": torchvision.models.list_models(torchvision.models)}
    if library and library not in lists:
        raise SpecError(Fault(where, f"unknown library '{library}'", "write timm/NAME or torchvision/NAME"))
    for found in [library] if library else list(lists):
        for candidate in candidates:
            # timm names may carry a tag of pretrained weights, resnet50.a1_in1k
            if candidate.partition(".")[0] in lists[found]:
                return found, candidate
    near = [*lists["timm"], *lists["torchvision"], "resnet_50", "resnet_18", "vit_base_patch16"]
    otherwise = "any timm or torchvision name works, and TAO's where these have the network"
    raise SpecError(Fault(where, f"no library has a network '{type_}'", did_you_mean(bare, near, otherwise)))


def _create(library: str, name: str, spec: ClassificationSpec, *, pretrained: bool) -> nn.Module:
    import timm
    import torchvision

    arguments: JsonObject = dict(spec.model.backbone.args)
    faults = [
        Fault(f"model.backbone.args.{name}", f"the network gets it from {source}", "take it out of the arguments")
        for name, source in _NOT_ARGUMENTS.items()
        if name in arguments
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
        what = f"{library} cannot build {name}: {_one_line(error)}"
        if pretrained:
            raise TaoqError(
                Fault("model.backbone.pretrained", what, "download the weights where there is a network")
            ) from error
        hint = f"see the constructor of {name} in {library}"
        raise SpecError(Fault("model.backbone.args", what, hint)) from error
    except OSError as error:  # the network, or the hub's cache
        what = f"the pretrained weights of {name} cannot be downloaded: {_one_line(error)}"
        raise TaoqError(Fault("model.backbone.pretrained", what, "give a checkpoint file instead")) from error


def _check_pretrained_classes(have: int, want: int) -> None:
    if have != want:
        what = f"the pretrained weights have {have} classes, dataset.num_classes is {want}"
        raise SpecError(Fault("dataset.num_classes", what, "give a checkpoint trained on your classes"))


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
