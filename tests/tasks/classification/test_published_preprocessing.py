"""Preprocessing of published networks, against the transforms of their libraries."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_data_config
from torchvision import models
from transformers import AutoImageProcessor

from taoq.errors import SpecError, TaoqError
from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.data import preprocessing
from taoq.tasks.classification.published import with_published
from taoq.tasks.classification.spec import ClassificationSpec

FLOWER, CHINA = (Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg"))
IMAGES = (FLOWER, CHINA.crop((0, 0, 333, 427)), CHINA.resize((97, 64)))
"""Wide, tall, and smaller than inputs; 640 x 427, 333 x 427 and 97 x 64 pixels."""


def completed(type_: str, preprocessing: str, *written: str, **dataset: Any) -> ClassificationSpec:
    augmentation = {"preprocessing": preprocessing, **dataset.pop("augmentation", {})}
    data = {"model": {"backbone": {"type": type_}}, "dataset": {"augmentation": augmentation, **dataset}}
    return with_published(spec_from_dict(data, ClassificationSpec), lambda field: field in written)


def assert_same(spec: ClassificationSpec, theirs: Callable[[Image.Image], Any]) -> None:
    """Check that inputs are the same within one level of 255."""
    augmentation = spec.dataset.augmentation
    transform = preprocessing(augmentation, spec.dataset.img_size)
    for image in IMAGES:
        given, expected = transform(image).numpy(), np.asarray(theirs(image))
        assert given.shape == expected.shape
        levels = np.abs(given - expected).max((1, 2)) * np.array(augmentation.std) * 255
        assert levels.max() <= 1.001


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",  # bicubic, 0.95
        "resnet50.tv_in1k",  # bilinear, 0.875
        "tf_efficientnet_lite0",  # mean and std 0.5
        "vit_base_patch16_224",
        "vit_tiny_patch16_384",  # 1.0
        "inception_v3",  # 299 pixels
        "mobilenetv3_large_100",
        "convnext_tiny",
        "beit_base_patch16_224",
        "volo_d5_512",  # 1.15: padded
        "davit_tiny",
        "maxvit_tiny_tf_384",  # squash
        "eva02_tiny_patch14_336",
        "naflexvit_base_patch16_gap",  # border
    ],
)
def test_inputs_are_those_of_timm(name: str) -> None:
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert_same(completed(name, "timm"), create_transform(**config, is_training=False))


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet50", "IMAGENET1K_V2"),
        ("resnet50", "IMAGENET1K_V1"),
        ("efficientnet_b0", ""),
        ("efficientnet_v2_m", ""),
        ("inception_v3", ""),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("swin_v2_t", ""),
        ("mobilenet_v2", ""),
    ],
)
def test_inputs_are_those_of_torchvision(name: str, weights: str) -> None:
    entries = models.get_model_weights(name)
    transform = (entries[weights] if weights else entries.DEFAULT).transforms()
    assert_same(completed(f"torchvision/{name}", f"torchvision/{weights}" if weights else "torchvision"), transform)


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {},
    "DeiT": {"size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
    "ConvNext below 384": {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
    "ConvNext from 384": {"size": {"shortest_edge": 384}},
    "EfficientNet": {"size": {"height": 240, "width": 240}, "do_center_crop": False},
    "EfficientNet offset": {"size": {"height": 64, "width": 64}, "rescale_factor": 1 / 127.5, "rescale_offset": True},
    "MobileNetV2": {},
    "MobileViT": {"size": {"shortest_edge": 288}, "do_normalize": False},
    "Levit": {},
    "PoolFormer": {"size": {"shortest_edge": 224}, "crop_pct": 0.9},
    "Bit": {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
    "Pvt": {},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_inputs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    data = {"image_processor_type": f"{name.partition(' ')[0]}ImageProcessor", **PROCESSORS[name]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data), encoding="utf-8")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    spec = completed("resnet_50", f"huggingface/{tmp_path}")
    assert_same(spec, lambda image: processor(image, return_tensors="np")["pixel_values"][0])


def test_what_was_taken_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "taoq")
    spec = completed("inception_v3", "timm")
    assert caplog.messages == [
        "dataset.augmentation.preprocessing: timm: inception_v3.tv_in1k: shorter side to 341, bicubic;"
        " centre crop 299; mean [0.5, 0.5, 0.5]; std [0.5, 0.5, 0.5]"
    ]
    assert spec.dataset.img_size == 299


def test_a_written_field_stays_and_a_difference_is_said(caplog: pytest.LogCaptureFixture) -> None:
    written = ("dataset.augmentation.interpolation", "dataset.augmentation.resize_to", "dataset.img_size")
    augmentation = {"interpolation": "bilinear", "resize_to": 256}
    spec = completed("vit_base_patch16_224", "timm", *written, augmentation=augmentation, img_size=224)
    assert preprocessing(spec.dataset.augmentation, spec.dataset.img_size).resize_to == 256
    assert (spec.dataset.augmentation.interpolation, spec.dataset.augmentation.resize) == ("bilinear", "shorter_side")
    name = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert caplog.messages == [
        f"dataset.augmentation.resize_to: is 256 as the spec says, instead of the None of {name}",
        f"dataset.augmentation.interpolation: is bilinear as the spec says, instead of the bicubic of {name}",
    ]


def test_another_size_is_cropped_in_proportion() -> None:
    spec = completed("torchvision/resnet50", "torchvision", "dataset.img_size", img_size=448)
    assert preprocessing(spec.dataset.augmentation, 448).resize_to == 464  # twice 232


def test_another_mean_than_the_published_one_is_said(caplog: pytest.LogCaptureFixture) -> None:
    completed("vit_base_patch16_224", "")
    assert caplog.messages == [
        f"dataset.augmentation.{name}: is {own}, but [0.5, 0.5, 0.5] in timm's"
        " vit_base_patch16_224.augreg2_in21k_ft_in1k: right only if it was trained so"
        for name, own in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225]))
    ]
    caplog.clear()
    for type_ in ("resnet_50", "torchvision/vgg16", "fan_tiny_8_p4_hybrid", "no_such_network", ""):
        completed(type_, "")
    assert caplog.messages == []


WRITE = "hint: name other weights, or write the fields of dataset.augmentation"
NAME = "hint: write huggingface/FOLDER with the folder that has it"


@pytest.mark.parametrize(
    ("type_", "preprocessing", "what", "hint"),
    [
        ("resnet50", "timm/a3_in1k_", "timm has no weights resnet50.a3_in1k_",
         "hint: did you mean 'a3_in1k' or 'ra_in1k' or 'am_in1k'?"),
        ("resnet50", "torchvision/V3", "torchvision has no weights V3 of resnet50",
         "hint: one of IMAGENET1K_V1, IMAGENET1K_V2"),
        ("convnext_pico", "torchvision", "torchvision does not say how convnext_pico is fed", WRITE),
        ("fan_tiny_8_p4_hybrid", "timm", "timm does not say how fan_tiny_8_p4_hybrid is fed", WRITE),
        ("resnet50", "huggingface", "no checkpoint of the spec is a folder with preprocessor_config.json", NAME),
        ("resnet50", "huggingface/nowhere", "nowhere is no folder with preprocessor_config.json", NAME),
    ],
)  # fmt: skip
def test_what_a_library_does_not_have_is_refused(type_: str, preprocessing: str, what: str, hint: str) -> None:
    with pytest.raises(SpecError) as error:
        completed(type_, preprocessing)
    assert str(error.value).splitlines() == [f"dataset.augmentation.preprocessing: {what}", hint]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"size": {"shortest_edge": 224}}, "keeps the aspect ratio without a crop, so that inputs differ in size"),
        ({"size": {"height": 224, "width": 192}},
         "resizes to {'height': 224, 'width': 192}, which is not one size of square inputs"),
        ({"do_resize": False}, "does not resize images, so that inputs differ in size"),
    ],
)  # fmt: skip
def test_a_processor_without_one_input_size_is_refused(data: Any, what: str, tmp_path: Path) -> None:
    content = json.dumps({"image_processor_type": "ViTImageProcessor", **data})
    (tmp_path / "preprocessor_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(TaoqError) as error:
        completed("resnet_50", f"huggingface/{tmp_path}")
    assert str(error.value).splitlines() == [
        f"dataset.augmentation.preprocessing: {tmp_path} {what}",
        "hint: write the fields of dataset.augmentation",
    ]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"image_processor_type": "Nonsense"}'])
def test_a_file_that_is_no_processor_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(TaoqError) as error:
        completed("resnet_50", f"huggingface/{tmp_path}")
    what, hint = str(error.value).splitlines()
    assert what.startswith(
        f"dataset.augmentation.preprocessing: {tmp_path} has no preprocessor_config.json that transformers can read: "
    )
    assert hint == "hint: name a folder with the file of an image processor"


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass P: pass\n", encoding="utf-8")
    data = {"auto_map": {"AutoImageProcessor": "code.P"}, "image_processor_type": "P"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(TaoqError):
        completed("resnet_50", f"huggingface/{tmp_path}")
    assert not (tmp_path / "ran").exists()
