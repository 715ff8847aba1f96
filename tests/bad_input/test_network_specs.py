"""A network that cannot be built, or that a library cannot calibrate, is refused with its line of the spec."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from support.small_spec import CALIBRATION_NOTICES, STATIC_EDITS, Edit, Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"type: resnet_18": "type: resnet_81"},
            "spec.yaml:5: model.backbone.type: no library has a network 'resnet_81'\n"
            "hint: did you mean 'resnet_18' or 'resnet_18d' or 'resnet_101'?\n",
            id="unknown",
        ),
        pytest.param(
            {"type: resnet_18": "type: segformer_b0"},
            "spec.yaml:5: model.backbone.type: no library has a network 'segformer_b0'\n"
            "hint: any timm or torchvision name works, and those of TAO in docs/tao-backbones.md\n",
            id="unknown, and nothing is near",
        ),
        pytest.param(
            {"type: resnet_18": "type: faster_vit_2_224"},
            "spec.yaml:5: model.backbone.type: taoq does not build faster_vit_2_224: no library that it uses has"
            " FasterViT\nhint: the nearest one that it builds is gc_vit_base\n",
            id="of TAO that no library has",
        ),
        pytest.param(
            {"type: resnet_18": "type: hiera_tiny_224", "args: {channels: [16, 32, 64, 128]}": "args: {}"},
            "spec.yaml:12: dataset.img_size: is 32, but hiera_tiny_224 takes images of 224 pixels\n"
            "hint: write 224, which TAO uses too\n",
            id="that does not take the size of the images",
        ),
        pytest.param(
            {"type: resnet_18": "type: keras/resnet18"},
            "spec.yaml:5: model.backbone.type: unknown library 'keras'\nhint: write timm/NAME or torchvision/NAME\n",
            id="of an unknown library",
        ),
        pytest.param(
            {"type: resnet_18": "type: ''"},
            "spec.yaml:5: model.backbone.type: missing: which network is it?\n"
            "hint: write a name, for example resnet_50\n",
            id="not given",
        ),
        pytest.param(
            {"args: {channels": "args: {chanels"},
            "spec.yaml:6: model.backbone.args: timm cannot build resnet18:"
            " ResNet.__init__() got an unexpected keyword argument 'chanels'\n"
            "hint: see the constructor of resnet18 in timm\n",
            id="with an unknown argument",
        ),
        pytest.param(
            {"type: resnet_18": "type: torchvision/resnet18", "args: {channels": "args: {chanels"},
            "spec.yaml:6: model.backbone.args: torchvision cannot build resnet18:"
            " ResNet.__init__() got an unexpected keyword argument 'chanels'\n"
            "hint: see the constructor of resnet18 in torchvision\n",
            id="of torchvision with an unknown argument",
        ),
        pytest.param(
            {"args: {channels": "args: {num_classes: 3, channels"},
            "spec.yaml:6: model.backbone.args.num_classes: the network gets it from dataset.num_classes\n"
            "hint: take it out of the arguments\n",
            id="with num_classes in the arguments",
        ),
        pytest.param(
            {"model_path: weights.safetensors": "model_path: ''"},
            "spec.yaml:4: model.backbone.pretrained: no checkpoint is given, and pretrained weights are not asked for\n"
            "hint: give the checkpoint in the action's section, or set model.backbone.pretrained: true\n",
            id="without weights",
        ),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(
    edit: Edit, refused: Refused, changes: Mapping[str, str], message: str
) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)


def test_an_argument_of_the_network_that_names_a_checkpoint_is_refused(edit: Edit, refused: Refused) -> None:
    """timm would load it without taoq's check for code."""
    edit({"args: {channels": "args: {checkpoint_path: weights.pth, channels"})
    assert refused("quantize") == (
        2,
        "spec.yaml:6: model.backbone.args.checkpoint_path: the network gets it from the checkpoint of the action\n"
        "hint: take it out of the arguments\n",
    )


def test_an_argument_of_modelopt_that_does_not_fit_the_network_is_refused(edit: Edit, refused: Refused) -> None:
    edit({**STATIC_EDITS, "backend_kwargs: {}": "backend_kwargs: {layerwise: {enable: true}}"})
    assert refused("quantize") == (
        2,
        f"{CALIBRATION_NOTICES['modelopt.pytorch']}"
        "spec.yaml:35: quantize.backend_kwargs: ModelOpt cannot calibrate with these arguments: Could not find"
        " transformer layers in model. Layerwise calibration requires a model with identifiable transformer layers.\n"
        "hint: take out those that this network does not allow\n",
    )
