"""Reading a detector's data: categories, annotations, images, calibration images, names of classes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

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

COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


@pytest.mark.parametrize(
    ("ids", "classes", "expected"),
    [
        ([3, 7], 2, (3, 7)),
        ([0, 1], 2, (0, 1)),
        ([1, 2], 3, (-1, 1, 2)),  # TAO: the largest id + 1
        ([1, 4], 5, (-1, 1, -1, -1, 4)),
        (COCO_IDS, 80, tuple(COCO_IDS)),
        (COCO_IDS, 91, tuple(number if number in COCO_IDS else -1 for number in range(91))),
    ],
    ids=["not contiguous", "from 0", "TAO's from 1", "TAO's with gaps", "COCO's 80", "COCO's 91"],
)
def test_outputs_mean_categories(tmp_path: Path, ids: list[int], classes: int, expected: tuple[int, ...]) -> None:
    write_three_images(tmp_path, categories={id_: f"class_{id_}" for id_ in ids})
    for remap in (False, classes == 80):
        spec = detector_spec(tmp_path, classes=classes, dataset={"remap_mscoco_category": remap})
        coco = read_annotations(spec)
        assert coco.category_ids == expected
        assert [name for name in coco.names if name.startswith("class_")] == [f"class_{id_}" for id_ in ids]


@pytest.mark.parametrize(
    ("ids", "classes", "remap", "message"),
    [
        (
            [3, 7],
            4,
            False,
            "dataset.num_classes: is 4; {json} has 2 categories with ids up to 7\n"
            "hint: write 2, or 8 if the network was trained with TAO's largest id + 1",
        ),
        (
            [3, 7],
            8,
            True,
            "dataset.num_classes: is 8; {json} has 2 categories with ids up to 7\n"
            "hint: write 2, or dataset.remap_mscoco_category: false if the outputs are category ids",
        ),
        ([], 1, False, "{json}: names no categories\nhint: name a COCO json with categories"),
    ],
    ids=["neither fits", "remapped and yet the ids", "no categories"],
)
def test_classes_that_do_not_fit_the_json_are_refused(
    tmp_path: Path, ids: list[int], classes: int, remap: bool, message: str
) -> None:
    categories = [{"id": id_, "name": str(id_)} for id_ in ids]
    path = write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}], (), categories)
    spec = detector_spec(tmp_path, classes=classes, num_select=1, dataset={"remap_mscoco_category": remap})
    with pytest.raises(TaoqError) as error:
        read_coco(str(path), "json_file", spec)
    assert str(error.value) == message.format(json=path)


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
    boxes = [[1, 2, 30, 20], [5, 5, 0, 9], [5, 5, 9, -1], [90, 50, 30, 30]]
    write_three_images(tmp_path, annotations=[{"image_id": 10, "category_id": 1, "bbox": box} for box in boxes])
    with caplog.at_level(logging.WARNING, "taoq"):
        coco = read_annotations(detector_spec(tmp_path))
    assert [(entry["bbox"], entry["area"], entry["iscrowd"]) for entry in coco.data["annotations"]] == [
        (boxes[0], 600, 0),
        (boxes[3], 900, 0),  # reaches over the edge, which is usual
    ]
    assert caplog.messages == [
        "dataset.test_data_sources.json_file: 2 annotation(s) without width or height are left out"
    ]


def test_odd_values_of_annotations_are_completed(tmp_path: Path) -> None:
    common = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 20]}
    path = write_coco(
        tmp_path,
        [{"id": 1, "file_name": "a.png", "width": "100", "height": None}],
        [{**common, "area": None, "iscrowd": None}, {**common, "area": 7, "iscrowd": True}, {**common, "id": "x"}],
        [{"id": 3, "name": 3}, {"id": 7, "name": "car"}],
    )
    coco = read_coco(str(path), "json_file", detector_spec(tmp_path))
    assert [(entry["id"], entry["area"], entry["iscrowd"]) for entry in coco.data["annotations"]] == [
        (1, 600, 0),
        (2, 7, 1),
        (3, 600, 0),
    ]
    assert coco.names == ("3", "car")


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
    with_background = detector_spec(tmp_path, classes=3, dataset={"infer_data_sources": classmap})
    assert class_names(with_background) == ("background", "x", "y")
    with caplog.at_level(logging.WARNING, "taoq"):
        assert class_names(detector_spec(tmp_path, dataset={"test_data_sources": {}})) == ("0", "1")
    assert caplog.messages == ["dataset.infer_data_sources.classmap: nothing names the classes, they are numbered"]


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
