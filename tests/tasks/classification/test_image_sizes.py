"""A size of images that a network does not take is refused when the network is built, before any data is read."""

from __future__ import annotations

import dataclasses

import pytest

from taoq.errors import SpecError
from taoq.plain import JsonObject
from taoq.tasks.classification.export import with_size
from taoq.tasks.classification.model import build_model
from taoq.tasks.classification.spec import ClassificationSpec

_SMALL_VIT: JsonObject = {"embed_dim": 12, "depth": 1, "num_heads": 1}


def _spec(type_: str, size: int, args: JsonObject | None = None) -> ClassificationSpec:
    spec = ClassificationSpec()
    backbone = dataclasses.replace(spec.model.backbone, type=type_, args=args or {})
    return dataclasses.replace(
        spec,
        model=dataclasses.replace(spec.model, backbone=backbone),
        dataset=dataclasses.replace(spec.dataset, num_classes=3, img_size=size),
    )


@pytest.mark.parametrize(
    ("type_", "size", "args", "message"),
    [
        pytest.param(
            "timm/vit_tiny_patch16_224",
            64,
            _SMALL_VIT,
            "dataset.img_size: is 64, but vit_tiny_patch16_224 takes images of 224 pixels\n"
            "hint: write 224; for a checkpoint of a network for 64 pixels, write model.backbone.args: {img_size: 64}",
            id="checked by timm",
        ),
        pytest.param(
            "timm/vit_tiny_patch16_224",
            224,
            {**_SMALL_VIT, "img_size": 64},
            "dataset.img_size: is 224, but vit_tiny_patch16_224 takes images of 64 pixels\n"
            "hint: write 64; for a checkpoint of a network for 224 pixels, write model.backbone.args: {img_size: 224}",
            id="another one in the arguments",
        ),
        pytest.param(
            "timm/levit_128s",
            64,
            {},
            "dataset.img_size: is 64, but levit_128s takes images of 224 pixels\n"
            "hint: write 224; for a checkpoint of a network for 64 pixels, write model.backbone.args: {img_size: 64}",
            id="not checked by timm",
        ),
        pytest.param(
            "timm/coat_tiny",
            50,
            {},
            "dataset.img_size: is 50, but coat_tiny takes images of 224 pixels\nhint: write 224",
            id="not a multiple of the patches",
        ),
        pytest.param(
            "torchvision/maxvit_t",
            64,
            {},
            "dataset.img_size: is 64, but maxvit_t does not run on it:"
            " shape '[1, 64, 2, 7, 2, 7]' is invalid for input of size 16384\n"
            "hint: write 224",
            id="of torchvision, not checked",
        ),
        pytest.param(
            "timm/inception_v3",
            64,
            {},
            "dataset.img_size: is 64, but inception_v3 does not run on it: Calculated padded input size per channel:"
            " (2 x 2). Kernel size: (3 x 3). Kernel size can't be greater than actual input size\n"
            "hint: write 299",
            id="too small",
        ),
    ],
)
def test_a_size_that_the_network_does_not_take_is_refused(
    type_: str, size: int, args: JsonObject, message: str
) -> None:
    with pytest.raises(SpecError) as error:
        build_model(_spec(type_, size, args), None)
    assert str(error.value) == message


def test_the_size_in_the_hint_is_taken() -> None:
    build_model(_spec("timm/vit_tiny_patch16_224", 64, {**_SMALL_VIT, "img_size": 64}), None)


def test_the_size_of_an_exported_file_is_checked_like_that_of_the_data() -> None:
    spec = _spec("timm/vit_tiny_patch16_224", 64, {**_SMALL_VIT, "img_size": 64})
    with pytest.raises(SpecError) as error:
        with_size(spec, 224, 224)
    assert str(error.value) == (
        "export.input_height: is 224, but vit_tiny_patch16_224 takes images of 64 pixels\n"
        "hint: write 64; for a checkpoint of a network for 224 pixels, write model.backbone.args: {img_size: 224}"
    )
