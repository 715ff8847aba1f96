"""Average precision of a resample, against pycocotools on a data set with copies of the drawn images."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from support.coco import coco_results, detector_spec, write_coco
from taoq.tasks.rtdetr.data import Targets
from taoq.tasks.rtdetr.metric import CocoMetric
from taoq.tasks.rtdetr.spec import RtdetrSpec

CATEGORIES = (2, 5, 9, 40)  # the last has no annotation
RARE = 9  # in two images
IMAGES = 9
QUERIES = 120
SIDE = 500
ID_STEP = 100  # between the ids of two images, to leave room for ids of copies


@dataclass
class Scenes:
    """Annotated images and a network's outputs for them, by image id."""

    annotations: list[dict[str, Any]]
    outputs: dict[int, tuple[Tensor, Tensor]]
    ids: list[int]

    def spec(self, folder: Path, **dataset: Any) -> RtdetrSpec:
        images = [{"id": id_, "file_name": f"{id_}.png"} for id_ in self.ids]
        write_coco(folder, images, self.annotations, [{"id": id_, "name": str(id_)} for id_ in CATEGORIES])
        classes = len(CATEGORIES)
        return detector_spec(folder, classes=classes, queries=QUERIES, num_select=QUERIES * classes, dataset=dataset)

    def metric(self, folder: Path, **dataset: Any) -> CocoMetric:
        metric = CocoMetric(self.spec(folder, **dataset))
        for id_ in self.outputs:
            metric.update(*self.batch(id_))
        metric.compute()
        return metric

    def batch(self, id_: int) -> tuple[dict[str, Tensor], Targets]:
        """Outputs and targets of one image."""
        logits, boxes = self.outputs[id_]
        targets = Targets((id_,), torch.tensor([[float(SIDE), float(SIDE)]]))
        return {"pred_logits": logits[None], "pred_boxes": boxes[None]}, targets

    def indices_of(self, category: int) -> list[int]:
        """Indices, in the order of the counts, of the images that have an annotation of a category."""
        ids = {annotation["image_id"] for annotation in self.annotations if annotation["category_id"] == category}
        return [index for index, id_ in enumerate(sorted(self.ids)) if id_ in ids]


def make_scenes(*, step: float = 0.0) -> Scenes:
    """Random boxes, crowds, images without any; with a step, logits are multiples of it and many are equal."""
    random = np.random.default_rng(5)
    ids = [ID_STEP * int(number) for number in random.permutation(IMAGES) + 1]
    annotations: list[dict[str, Any]] = []
    outputs = {}
    for image in ids:
        logits = random.normal(-3, 1, (QUERIES, len(CATEGORIES))).astype(np.float32)
        boxes = random.uniform(0.1, 0.9, (QUERIES, 4)).astype(np.float32)
        boxes[:, 2:] *= 0.2
        labels = [*random.integers(2, size=random.integers(2, 8)), *([2] if image in (100, 300) else [])]
        for number, label in enumerate([] if image in (200, 700) else labels):
            w, h = random.uniform(20, 150, 2)
            x, y = random.uniform(0, 300, 2)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": CATEGORIES[label], "area": w * h,
                 "bbox": [x, y, w, h], "iscrowd": int(number == 1)}
            )  # fmt: skip
            for query in (2 * number, 2 * number + 1):  # of two for one box, one at most is right
                shift = random.uniform(-0.35, 0.35) * w
                boxes[query] = np.array([x + shift + w / 2, y + h / 2, w, h]) / SIDE
                logits[query, label] = random.normal(-1, 1.5)
        if step:
            logits = np.round(logits / step) * np.float32(step)
        outputs[image] = torch.from_numpy(logits), torch.from_numpy(boxes)
    return Scenes(annotations, outputs, ids)


def precision_of_copies(
    scenes: Scenes, folder: Path, counts: NDArray[np.int64], categories: tuple[int, ...] = CATEGORIES
) -> dict[str, float]:
    """Figures of pycocotools on a data set with `counts` copies of each image, its annotations and its detections."""
    spec = scenes.spec(folder)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for id_, count in zip(sorted(scenes.ids), counts.tolist(), strict=True):
        rows = coco_results(spec, *scenes.batch(id_), CATEGORIES)
        for copy in range(id_, id_ + count):
            images.append({"id": copy})
            for annotation in scenes.annotations:
                if annotation["image_id"] == id_:
                    annotations.append({**annotation, "id": len(annotations) + 1, "image_id": copy})
            for row in rows:
                area = row["bbox"][2] * row["bbox"][3]
                results.append({**row, "id": len(results) + 1, "image_id": copy, "area": area, "iscrowd": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        datasets = COCO(), COCO()
        for dataset, rows in zip(datasets, (annotations, results), strict=True):
            names = [{"id": id_} for id_ in CATEGORIES]
            dataset.dataset = {"images": images, "categories": names, "annotations": rows}
            dataset.createIndex()
        evaluation = COCOeval(*datasets, "bbox")
        evaluation.params.catIds = list(categories)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]

    def mean(values: NDArray[np.float64]) -> float:
        defined = values[values > -1]
        return float(defined.mean()) if defined.size else math.nan

    return {"val_mAP": mean(precision), "val_mAP50": mean(precision[0]), "AP75": mean(precision[5])}


def resampled(metric: CocoMetric, counts: NDArray[np.int64]) -> dict[str, float]:
    return {figure: metric.resampled(figure, counts) for figure in metric.figures}


def test_figures_and_images_are_known_before_any_data(tmp_path: Path) -> None:
    metric = CocoMetric(make_scenes().spec(tmp_path))
    assert metric.figures == ("val_mAP", "val_mAP50", "AP75")
    assert metric.num_samples == IMAGES


@pytest.mark.parametrize("step", [0.0, 0.5, 4.0], ids=["no ties", "ties", "almost only ties"])
def test_resampled_is_the_figure_of_repeated_images(tmp_path: Path, step: float) -> None:
    scenes = make_scenes(step=step)
    metric = scenes.metric(tmp_path)
    random = np.random.default_rng(1)
    precisions = set()
    for _ in range(3):
        counts = random.multinomial(IMAGES, [1 / IMAGES] * IMAGES)
        expected = precision_of_copies(scenes, tmp_path, counts)
        assert 0.005 < expected["AP75"] < expected["val_mAP50"] < 1
        assert resampled(metric, counts) == pytest.approx(expected, abs=1e-9)
        precisions.add(expected["val_mAP"])
    assert len(precisions) == 3


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["no ties", "ties"])
def test_each_image_once_is_what_compute_gives(tmp_path: Path, step: float) -> None:
    scenes = make_scenes(step=step)
    metric = CocoMetric(scenes.spec(tmp_path))
    for number, id_ in enumerate(scenes.outputs):
        metric.update(*scenes.batch(id_))
        if number in (4, IMAGES - 1):  # also if more images come after it was computed
            figures = metric.compute()
            expected = {name: figures[name] for name in metric.figures}
            assert resampled(metric, np.ones(IMAGES, np.int64)) == pytest.approx(expected, abs=1e-12)


def test_a_class_that_no_drawn_image_has_does_not_count(tmp_path: Path) -> None:
    scenes = make_scenes()
    counts = np.full(IMAGES, 2)
    counts[scenes.indices_of(RARE)] = 0
    expected = precision_of_copies(scenes, tmp_path, counts)
    assert resampled(scenes.metric(tmp_path), counts) == pytest.approx(expected, abs=1e-9)
    assert expected != pytest.approx(precision_of_copies(scenes, tmp_path, np.full(IMAGES, 2)), abs=1e-3)


def test_chosen_classes_only(tmp_path: Path) -> None:
    scenes = make_scenes()
    metric = scenes.metric(tmp_path, eval_class_ids=[2, RARE])
    counts = np.arange(IMAGES) % 3
    expected = precision_of_copies(scenes, tmp_path, counts, (2, RARE))
    assert resampled(metric, counts) == pytest.approx(expected, abs=1e-9)


def test_a_crowd_alone_is_nothing_to_detect(tmp_path: Path) -> None:
    scenes = make_scenes()
    for annotation in scenes.annotations:
        if annotation["category_id"] == RARE:
            annotation["iscrowd"] = 1
    metric = scenes.metric(tmp_path)
    counts = np.full(IMAGES, 2)
    expected = precision_of_copies(scenes, tmp_path, counts)
    assert resampled(metric, counts) == pytest.approx(expected, abs=1e-9)


def test_images_without_annotations_have_no_figure(tmp_path: Path) -> None:
    scenes = make_scenes()
    counts = np.zeros(IMAGES, np.int64)
    counts[[1, 6]] = 3  # ids 200 and 700
    expected = precision_of_copies(scenes, tmp_path, counts)
    assert all(math.isnan(value) for value in expected.values())
    assert resampled(scenes.metric(tmp_path), counts) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("images", ["none", "one"])
def test_no_detection_is_zero(tmp_path: Path, images: str) -> None:
    """No detections at all, or only in an image that is not drawn."""
    scenes = make_scenes()
    scenes.outputs = {} if images == "none" else {100: scenes.outputs[100]}
    counts = np.ones(IMAGES, np.int64)
    counts[0] = 0 if images == "one" else 1
    metric = scenes.metric(tmp_path)
    assert resampled(metric, counts) == dict.fromkeys(metric.figures, 0)
