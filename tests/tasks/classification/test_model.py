"""Networks of a classifier by the names of TAO, timm and torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from taoq.errors import SpecError
from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.model import build_model
from taoq.tasks.classification.spec import ClassificationSpec


def spec(type_: str, **backbone: Any) -> ClassificationSpec:
    data = {"model": {"backbone": {"type": type_, **backbone}}, "dataset": {"num_classes": 5}}
    return spec_from_dict(data, ClassificationSpec)


def refusal(type_: str, checkpoint: str | None = None, **backbone: Any) -> str:
    """The error of building a network."""
    with pytest.raises(SpecError) as error:
        build_model(spec(type_, **backbone), checkpoint)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "module", "args"),
    [
        ("resnet_18", "timm.models.resnet", {"channels": [8, 8, 8, 8]}),
        ("resnet18", "timm.models.resnet", {"channels": [8, 8, 8, 8]}),
        ("timm/resnet18", "timm.models.resnet", {"channels": [8, 8, 8, 8]}),
        ("torchvision/mobilenet_v3_small", "torchvision.models.mobilenetv3", {}),
        ("mobilenet_v3_small", "torchvision.models.mobilenetv3", {}),
        ("convnext_tiny", "timm.models.convnext", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}),
        ("vit_base_patch16", "timm.models.vision_transformer", {"depth": 1, "embed_dim": 12}),
        ("vit_tiny_patch16_224.augreg_in21k", "timm.models.vision_transformer", {"depth": 1, "embed_dim": 12}),
        ("gc_vit_xtiny", "timm.models.gcvit", {}),
        ("resnet_50d", "timm.models.resnet", {"channels": [8, 8, 8, 8]}),
    ],
)
def test_names_of_tao_timm_and_torchvision_are_built(name: str, module: str, args: dict[str, Any]) -> None:
    model = build_model(spec(name, args=args), None).eval()
    assert type(model).__module__ == module
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet_19",
            "no library has a network 'resnet_19'\nhint: did you mean 'resnet_18' or 'resnet_18d' or 'resnet_101'?",
        ),
        ("keras/resnet", "unknown library 'keras'\nhint: write timm/NAME or torchvision/NAME"),
        ("", "missing: which network is it?\nhint: write a name, for example resnet_50"),
    ],
)
def test_an_unknown_network_is_refused_with_near_names(name: str, message: str) -> None:
    assert refusal(name) == f"model.backbone.type: {message}"


def test_wrong_constructor_arguments_name_the_library() -> None:
    message = refusal("torchvision/resnet18", args={"depths": 3})
    assert message.startswith("model.backbone.args: torchvision cannot build resnet18: ")
    assert message.endswith("'depths'\nhint: see the constructor of resnet18 in torchvision")


def test_pretrained_weights_must_be_set_where_there_is_no_checkpoint() -> None:
    assert refusal("resnet_18", "") == (
        "model.backbone.pretrained: no checkpoint is given, and pretrained weights are not asked for\n"
        "hint: give the checkpoint in the action's section, or set model.backbone.pretrained: true"
    )


@pytest.mark.parametrize("name", ["resnet_18", "torchvision/resnet18"])
def test_pretrained_weights_must_have_the_classes_of_the_data(name: str) -> None:
    assert refusal(name, "", pretrained=True) == (
        "dataset.num_classes: the pretrained weights have 1000 classes, dataset.num_classes is 5\n"
        "hint: give a checkpoint trained on your classes"
    )
