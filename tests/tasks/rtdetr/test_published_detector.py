"""Preprocessing of published detectors, against the image processor of transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor

from taoq.errors import TaoqError
from taoq.spec.load import spec_from_dict
from taoq.tasks.rtdetr.data import preprocessing
from taoq.tasks.rtdetr.published import with_published
from taoq.tasks.rtdetr.spec import RtdetrSpec


def folder_of(path: Path, **fields: Any) -> Path:
    data = {"image_processor_type": "RTDetrImageProcessor", "size": {"height": 320, "width": 416}, **fields}
    (path / "preprocessor_config.json").write_text(json.dumps(data), encoding="utf-8")
    return path


def completed(folder: Path, *written: str, **augmentation: Any) -> RtdetrSpec:
    dataset = {"augmentation": {"preprocessing": "huggingface", **augmentation}}
    data = {"dataset": dataset, "quantize": {"model_path": str(folder)}}
    return with_published(spec_from_dict(data, RtdetrSpec), lambda field: field in written)


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_inputs_are_those_of_transformers(resample: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path, resample=resample)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with caplog.at_level(logging.INFO, "taoq"):
        transform = preprocessing(completed(folder))
    image = Image.fromarray(load_sample_image("china.jpg"))
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(transform(image).numpy() - theirs).max() < 1e-6
    name = {0: "nearest", 2: "bilinear", 3: "bicubic"}[resample]
    assert caplog.messages == [
        f"dataset.augmentation.preprocessing: huggingface: {folder}: resized to 320 x 416 (height x width), {name}"
    ]


def test_a_written_size_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    field = "dataset.augmentation.eval_spatial_size"
    spec = completed(folder_of(tmp_path), field, eval_spatial_size=[640, 640])
    assert spec.dataset.augmentation.eval_spatial_size == [640, 640]
    assert caplog.messages == [f"{field}: is [640, 640] as the spec says, instead of the [320, 416] of {tmp_path}"]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"do_normalize": True}, "normalizes images (mean [0.485, 0.456, 0.406]), which RT-DETR and TAO do not"),
        ({"do_rescale": False}, "does not scale pixels to 0..1"),
        ({"do_pad": True}, "pads images, which RT-DETR does not"),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}},
         "resizes images to {'longest_edge': 1333, 'shortest_edge': 800}, not to one height and width"),
    ],
)  # fmt: skip
def test_another_preprocessing_than_that_of_rtdetr_is_refused(
    fields: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(TaoqError) as error:
        completed(folder_of(tmp_path, **fields))
    assert str(error.value).splitlines() == [
        f"dataset.augmentation.preprocessing: {tmp_path} {what}",
        "hint: leave the field out, if the network was trained so",
    ]
