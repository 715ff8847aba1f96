"""Reading a detector's data: categories, annotations, images, calibration images, names of classes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.coco import SIZES, detector_spec, write_coco, write_three_images
from taoq.errors import TaoqError
from taoq.tasks.rtdetr.coco import read_coco
from taoq.tasks.rtdetr.data import (
    INPUT,
    calibration_batches,
    class_names,
    evaluation_batches,
    inference_batches,
    read_annotations,
)
from taoq.tasks.rtdetr.metric import CocoMetric


def test_a_spec_without_annotations_is_refused(three_images: Path) -> None:
    with pytest.raises(TaoqError) as error:
        read_annotations(detector_spec(three_images, dataset={"test_data_sources": {}}))
    assert str(error.value) == (
        "dataset.test_data_sources.json_file: missing: evaluate needs annotated images\n"
        "hint: name a COCO json, and the folder of its images in image_dir"
    )


def test_annotations_are_completed_and_degenerate_ones_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [[1, 2, 30, 20], [5, 5, 0, 9], [5, 5, 9, -1], [float("nan"), 5, 9, 9], [90, 50, 30, 30]]
    write_three_images(tmp_path, annotations=[{"image_id": 10, "category_id": 1, "bbox": box} for box in boxes])
    with caplog.at_level(logging.INFO, "taoq"):
        rows = read_annotations(detector_spec(tmp_path)).annotations
    assert rows.boxes.tolist() == [boxes[0], boxes[4]]  # the last reaches over the edge, which is usual
    assert rows.areas.tolist() == [600, 900]
    assert rows.crowds.tolist() == [False, False]
    assert caplog.messages[:3] == [
        "dataset.test_data_sources.json_file: 3 annotation(s) without width or height are left out",
        "dataset.test_data_sources.json_file: 2 annotation(s) have no area: that of their box counts",
        "dataset.test_data_sources.json_file: 1 of 2 categories have no annotations, and do not count: b",
    ]


def test_odd_values_of_annotations_are_completed(tmp_path: Path) -> None:
    common = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 20]}
    path = write_coco(
        tmp_path,
        [{"id": 1, "file_name": "a.png", "width": "100", "height": None}, {"id": 2, "file_name": "b.png", "width": 0}],
        [
            {**common, "area": None, "iscrowd": None},
            {**common, "area": 7, "iscrowd": True},
            {**common, "area": "8.5", "iscrowd": "1", "id": "x"},
            {**common, "iscrowd": "0", "id": "x", "segmentation": [[1, 2, 3, 4, 5, 6]]},
        ],
        [{"id": 3, "name": 3}, {"id": 7}],
    )
    coco = read_coco(str(path), "json_file", detector_spec(tmp_path))
    assert coco.annotations.areas.tolist() == [600, 7, 8.5, 600]
    assert coco.annotations.crowds.tolist() == [False, True, True, False]
    assert coco.names == ("3", "7")
    assert np.array_equal(coco.images.sizes, [[100, np.nan], [np.nan, np.nan]], equal_nan=True)


def test_what_is_unusual_in_annotations_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    common = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 20]}
    image = {"id": 1, "file_name": "a.png"}
    path = write_coco(
        tmp_path,
        [image, image, {"id": 2, "file_name": "a.png"}],
        [{**common, "area": 0}, {**common, "area": -1}, {**common, "category_id": 7, "area": 5}],
        [{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}],
    )
    with caplog.at_level(logging.WARNING, "taoq"):
        coco = read_coco(str(path), "json_file", detector_spec(tmp_path))
    assert coco.images.ids == (1, 2)
    assert coco.names == ("cat (3)", "cat (7)")
    assert caplog.messages == [
        "json_file: 1 image(s) are in the list of images twice: they count once",
        "json_file: 1 image file(s) have several ids: each counts with the annotations of its own id only",
        "json_file: 2 annotation(s) have an area of 0 or less: COCO counts 0 as small, and ignores less",
        "json_file: 1 annotation(s) repeat another one: same image, category and box",
    ]


def test_file_names_of_windows_and_absolute_ones_are_found(tmp_path: Path) -> None:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("images/deep/a.png", "b.png", "images/c\\d.png"):
        Image.new("RGB", (80, 40)).save(tmp_path / name)
    names = ["deep\\a.png", str(tmp_path / "b.png"), "c\\d.png"]
    write_coco(tmp_path, [{"id": number, "file_name": name} for number, name in enumerate(names)])
    assert list(evaluation_batches(detector_spec(tmp_path)).paths) == [
        tmp_path / "images" / "deep" / "a.png",
        tmp_path / "b.png",
        tmp_path / "images" / "c\\d.png",
    ]


def test_images_are_stretched_to_height_and_width_in_0_to_1(three_images: Path) -> None:
    first, second = evaluation_batches(detector_spec(three_images))
    assert (first.inputs[INPUT].shape, second.inputs[INPUT].shape) == ((2, 3, 64, 96), (1, 3, 64, 96))
    assert first.inputs[INPUT].dtype == torch.float32
    assert first.inputs[INPUT][:, 0].min() > 0.98  # red, through JPEG
    assert first.inputs[INPUT][:, 1:].max() < 0.02
    assert first.targets.image_ids == (10, 20)
    assert first.targets.sizes.tolist() == [[100, 60], [64, 64]]


def test_an_image_is_turned_upright_before_its_size_is_taken(three_images: Path) -> None:
    image = Image.new("RGB", SIZES["a.jpg"])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(three_images / "images" / "a.jpg", exif=exif)
    batch = next(iter(evaluation_batches(detector_spec(three_images))))
    assert batch.targets.sizes[0].tolist() == [60, 100]


def test_memory_holds_one_batch_of_images(three_images: Path, opened_images: list[Path]) -> None:
    next(iter(inference_batches(detector_spec(three_images))))
    assert len(opened_images) == 2


def test_calibration_needs_images_only(tmp_path: Path) -> None:
    write_three_images(tmp_path, categories={})
    assert {path.name for path in calibration_batches(detector_spec(tmp_path)).paths} == set(SIZES)
    (tmp_path / "few.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "b.png"}]}), encoding="utf-8")
    source = {"image_dir": str(tmp_path / "images"), "json_file": str(tmp_path / "few.json")}
    spec = detector_spec(tmp_path, dataset={"quant_calibration_data_sources": source})
    assert [path.name for path in calibration_batches(spec).paths] == ["b.png"]


def test_the_same_seed_draws_the_same_images(tmp_path: Path) -> None:
    write_three_images(tmp_path, categories={})
    for number in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.png")

    def draw(seed: int) -> list[Path]:
        spec = detector_spec(tmp_path, quantize={"calibration": {"num_samples": 6, "seed": seed}})
        return list(calibration_batches(spec).paths)

    assert draw(1) == draw(1) != draw(2)
    assert len(draw(1)) == 6


def test_calibration_draws_the_same_images_from_a_json_as_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    names = [f"{number:02}.png" for number in range(12)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"images": [{"id": n, "file_name": name} for n, name in enumerate(names)]}))
    source = {"image_dir": str(tmp_path / "images"), "json_file": str(path)}
    calibration = {"quantize": {"calibration": {"num_samples": 5, "seed": 3, "batch_size": 4}}}
    draws = [
        [Path(path).name for batch in calibration_batches(spec) for path in batch.paths]
        for spec in (
            detector_spec(tmp_path, **calibration),
            detector_spec(tmp_path, dataset={"quant_calibration_data_sources": source}, **calibration),
        )
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 5


def test_names_for_inference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_three_images(tmp_path, categories={5: "cat", 9: "dog"})
    assert class_names(detector_spec(tmp_path)) == ("cat", "dog")
    (tmp_path / "names.txt").write_text("x\ny\n", encoding="utf-8")
    classmap = {"image_dir": [str(tmp_path / "images")], "classmap": str(tmp_path / "names.txt")}
    assert class_names(detector_spec(tmp_path, dataset={"infer_data_sources": classmap})) == ("x", "y")
    (tmp_path / "names.txt").write_text("x\ny\n", encoding="utf-8-sig")
    with_background = detector_spec(tmp_path, classes=3, dataset={"infer_data_sources": classmap})
    assert class_names(with_background) == ("background", "x", "y")
    with caplog.at_level(logging.WARNING, "taoq"):
        assert class_names(detector_spec(tmp_path, dataset={"test_data_sources": {}})) == ("0", "1")
    assert caplog.messages[-1] == "dataset.infer_data_sources.classmap: nothing names the classes, they are numbered"


def test_keys_change_with_all_that_figures_depend_on_and_nothing_else(tmp_path: Path) -> None:
    def keys(**changes: Any) -> tuple[str, str, str]:
        """Keys of the calibration images, the evaluation images and the metric."""
        spec = detector_spec(tmp_path, **changes)
        return calibration_batches(spec).key, evaluation_batches(spec).key, CocoMetric(spec).key

    image, box = {"id": 1, "file_name": "a.png"}, {"id": 1, "image_id": 1, "bbox": [1, 2, 30, 20]}
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 40)).save(tmp_path / "images" / "a.png")
    write_coco(tmp_path, [image], [box | {"category_id": 3}])
    calibration, evaluation, metric = keys()
    assert keys(dataset={"workers": 2}) == (calibration, evaluation, metric)
    assert keys(dataset={"infer_data_sources": {"classmap": "no.txt"}}, evaluate={"checkpoint": "other"}) == (
        calibration,
        evaluation,
        metric,
    )
    for change in ({"num_select": 2}, {"evaluate": {"conf_threshold": 0.5}}, {"dataset": {"eval_class_ids": [3]}}):
        assert keys(**change)[:2] == (calibration, evaluation)
        assert keys(**change)[2] != metric
    resized = keys(dataset={"augmentation": {"eval_spatial_size": [96, 96]}})
    assert [key == before for key, before in zip(resized, (calibration, evaluation, metric), strict=True)] == [
        False
    ] * 3
    write_coco(tmp_path, [image], [box | {"category_id": 7}])
    assert keys()[:2] == (calibration, evaluation)
    assert keys()[2] != metric
    write_coco(tmp_path, [image], [box | {"category_id": 3}])
    assert keys() == (calibration, evaluation, metric)
    Image.new("RGB", (31, 31)).save(tmp_path / "images" / "a.png")
    repainted = keys()
    assert [key == before for key, before in zip(repainted, (calibration, evaluation, metric), strict=True)] == [
        False,
        False,
        True,
    ]
