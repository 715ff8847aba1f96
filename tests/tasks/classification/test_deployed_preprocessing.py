"""What a deployer of a classifier reads: preprocessing in the manifest, and the configuration for DeepStream."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from taoq.errors import SpecError
from taoq.spec.load import spec_from_dict
from taoq.tasks.classification.data import preprocessing
from taoq.tasks.classification.export import deepstream
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.classification.task import TASK

HALF = [0.5, 0.5, 0.5]
WARNING = "export.serialize_nvdsinfer: DeepStream"


def spec(**augmentation: Any) -> ClassificationSpec:
    augmentation = {"mean": HALF, "std": HALF, **augmentation}
    return spec_from_dict(
        {"dataset": {"num_classes": 2, "img_size": 224, "augmentation": augmentation}}, ClassificationSpec
    )


def test_the_manifest_says_all_steps() -> None:
    assert TASK.preprocessing is not None
    assert TASK.preprocessing(spec()) == {
        "resize": "squash", "resize_to": 224, "interpolation": "bilinear", "antialias": True,
        "height": 224, "width": 224, "channel_order": "rgb", "scale": 1 / 255, "mean": HALF, "std": HALF,
    }  # fmt: skip
    cropped = spec(resize="shorter_side", crop_fraction=0.875, interpolation="bicubic", crop_rounding="down")
    assert TASK.preprocessing(cropped).items() >= {
        "resize": "shorter_side", "resize_to": 256, "interpolation": "bicubic", "crop_rounding": "down",
    }.items()  # fmt: skip
    padded = TASK.preprocessing(spec(resize="fit_and_pad", pad_color=[114, 114, 114]))
    assert (padded["resize"], padded["pad_color"]) == ("fit_and_pad", [114, 114, 114])


@pytest.mark.parametrize(
    ("augmentation", "properties", "warnings"),
    [
        ({}, {}, []),
        ({"interpolation": "bicubic"}, {"scaling-filter": 2}, []),
        ({"channel_order": "bgr", "mean": [0.1, 0.2, 0.3]},
         {"model-color-format": 1, "offsets": "76.5000;51.0000;25.5000"}, []),
        ({"resize": "fit_and_pad"}, {"maintain-aspect-ratio": 1, "symmetric-padding": 1}, []),
        ({"resize": "fit_and_pad", "pad_color": [1, 2, 3]}, {"maintain-aspect-ratio": 1, "symmetric-padding": 1},
         [f"{WARNING} pads with black, not with [1, 2, 3]"]),
        ({"resize": "shorter_side", "resize_to": 256}, {},
         [f"{WARNING} resizes images to the input, without a crop: it squashes them, instead of shorter side to 256,"
          " bilinear; centre crop 224; mean [0.5, 0.5, 0.5]; std [0.5, 0.5, 0.5]"]),
        ({"interpolation": "hamming"}, {}, [f"{WARNING} has no hamming: it takes bilinear"]),
    ],
)  # fmt: skip
def test_deepstream_gets_what_it_can_do(
    augmentation: dict[str, Any], properties: dict[str, Any], warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "taoq"):
        result = deepstream(spec(**augmentation)).properties
    plain = {
        "network-type": 1,
        "net-scale-factor": 1 / 127.5,
        "offsets": "127.5000;127.5000;127.5000",
        "output-blob-names": "output",
    }
    assert result == plain | properties
    assert [message for message in caplog.messages if "numbered" not in message] == warnings


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ({"antialias": False, "interpolation": "lanczos"},
         "antialias: is false, but lanczos exists only with it\n"
         "hint: write nearest, bilinear or bicubic, or antialias: true"),
        ({"crop_fraction": 0.875, "resize_to": 256},
         "crop_fraction: says what images are resized to, and so does resize_to\nhint: write one of the two"),
        ({"pad_color": [0]},
         "pad_color: [0] is not three numbers for red, green, blue\nhint: for example [114, 114, 114]"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(augmentation: dict[str, Any], message: str) -> None:
    wrong = spec(**augmentation).dataset
    with pytest.raises(SpecError) as error:
        preprocessing(wrong.augmentation, wrong.img_size)
    assert str(error.value) == f"dataset.augmentation.{message}"


def test_an_artifact_that_was_fed_in_another_way_is_refused() -> None:
    assert TASK.check_same_model is not None
    with pytest.raises(SpecError) as error:
        TASK.check_same_model(spec(), spec(resize="shorter_side", crop_fraction=0.875))
    assert str(error.value).splitlines() == [
        "dataset.augmentation.resize: is squash, the artifact was made with shorter_side",
        "hint: use the spec that it was quantized with",
        "dataset.augmentation.crop_fraction: is 1.0, the artifact was made with 0.875",
        "hint: use the spec that it was quantized with",
    ]
