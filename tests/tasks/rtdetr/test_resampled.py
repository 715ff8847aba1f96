"""Average precision of images that are there more or less often: as pycocotools finds it where they really are."""

from __future__ import annotations

import contextlib
import io
import json
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

from taoq.spec.load import spec_from_dict
from taoq.tasks.rtdetr.data import Targets
from taoq.tasks.rtdetr.metric import CocoMetric
from taoq.tasks.rtdetr.predict import detections
from taoq.tasks.rtdetr.spec import RtdetrSpec

CATEGORIES = (2, 5, 9, 40)  # the last has no annotation
RARE = 9  # in two images
IMAGES = 9
QUERIES = 120
SIDE = 500
ROOM = 100  # between the ids of two images, for copies


@dataclass
class Scene:
    """Annotated images and what a network says of them, best first in the order of `ids`."""

    ids: list[int]
    annotations: list[dict[str, Any]]
    outputs: dict[int, tuple[Tensor, Tensor]]

    def spec(self, folder: Path, **dataset: Any) -> RtdetrSpec:
        data = {
            "images": [{"id": id_, "file_name": f"{id_}.png"} for id_ in self.ids],
            "annotations": self.annotations,
            "categories": [{"id": id_, "name": str(id_)} for id_ in CATEGORIES],
        }
        (folder / "val.json").write_text(json.dumps(data), encoding="utf-8")
        sources = {"num_classes": len(CATEGORIES), "test_data_sources": {"json_file": str(folder / "val.json")}}
        model = {"num_queries": QUERIES, "num_select": QUERIES * len(CATEGORIES)}
        return spec_from_dict({"model": model, "dataset": {**sources, **dataset}}, RtdetrSpec)

    def metric(self, folder: Path, **dataset: Any) -> CocoMetric:
        metric = CocoMetric(self.spec(folder, **dataset))
        for id_, (logits, boxes) in self.outputs.items():
            metric.update({"pred_logits": logits[None], "pred_boxes": boxes[None]}, targets_of(id_))
        metric.compute()
        return metric


def targets_of(image: int) -> Targets:
    return Targets((image,), torch.tensor([[float(SIDE), float(SIDE)]]))


def scene(*, step: float = 0.0, seed: int = 5) -> Scene:
    """Random boxes, crowds, images without any; with a step, logits are multiples of it and many are equal."""
    random = np.random.default_rng(seed)
    ids = [ROOM * int(number) for number in random.permutation(IMAGES) + 1]
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
    return Scene(ids, annotations, outputs)


def repeated(
    job: RtdetrSpec, given: Scene, counts: NDArray[np.int64], categories: tuple[int, ...] = CATEGORIES
) -> dict[str, float]:
    """pycocotools over a data set in which each image, with what is annotated and found, is `counts` times."""
    images, truth, found = [], [], []
    for id_, count in zip(sorted(given.ids), counts.tolist(), strict=True):
        logits, boxes = given.outputs[id_]
        (of_it,) = detections(job, {"pred_logits": logits[None], "pred_boxes": boxes[None]}, targets_of(id_), 0.0)
        for copy in range(id_, id_ + count):
            images.append({"id": copy})
            for entry in given.annotations:
                if entry["image_id"] == id_:
                    truth.append({**entry, "id": len(truth) + 1, "image_id": copy})
            for score, label, box in zip(
                of_it.scores.tolist(), of_it.labels.tolist(), of_it.boxes.tolist(), strict=True
            ):
                x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
                found.append({"id": len(found) + 1, "image_id": copy, "category_id": CATEGORIES[label], "score": score,
                              "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        both = COCO(), COCO()
        for coco, annotations in zip(both, (truth, found), strict=True):
            names = [{"id": id_} for id_ in CATEGORIES]
            coco.dataset = {"images": images, "categories": names, "annotations": annotations}
            coco.createIndex()
        run = COCOeval(*both, "bbox")
        run.params.catIds = list(categories)
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], ["all"]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., 0, -1]

    def mean(values: NDArray[np.float64]) -> float:
        there = values[values > -1]
        return float(there.mean()) if there.size else math.nan

    return {"val_mAP": mean(precision), "val_mAP50": mean(precision[0]), "AP75": mean(precision[5])}


def resampled(metric: CocoMetric, counts: NDArray[np.int64]) -> dict[str, float]:
    return {figure: metric.resampled(figure, counts) for figure in metric.figures}


def images_with(given: Scene, category: int) -> list[int]:
    """Places, in the order of `counts`, of the images that have one."""
    having = {entry["image_id"] for entry in given.annotations if entry["category_id"] == category}
    return [place for place, id_ in enumerate(sorted(given.ids)) if id_ in having]


def test_figures_and_images_are_known_before_any_data(tmp_path: Path) -> None:
    metric = CocoMetric(scene().spec(tmp_path))
    assert metric.figures == ("val_mAP", "val_mAP50", "AP75")
    assert metric.num_samples == IMAGES


@pytest.mark.parametrize("step", [0.0, 0.5, 4.0], ids=["no ties", "ties", "almost only ties"])
def test_resampled_is_the_figure_of_repeated_images(tmp_path: Path, step: float) -> None:
    given = scene(step=step)
    metric = given.metric(tmp_path)
    random = np.random.default_rng(1)
    seen = set()
    for _ in range(3):
        counts = random.multinomial(IMAGES, [1 / IMAGES] * IMAGES)
        wanted = repeated(given.spec(tmp_path), given, counts)
        assert 0.005 < wanted["AP75"] < wanted["val_mAP50"] < 1
        assert resampled(metric, counts) == pytest.approx(wanted, abs=1e-9)
        seen.add(wanted["val_mAP"])
    assert len(seen) == 3


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["no ties", "ties"])
def test_each_image_once_is_what_compute_gives(tmp_path: Path, step: float) -> None:
    given = scene(step=step)
    metric = CocoMetric(given.spec(tmp_path))
    for number, (id_, (logits, boxes)) in enumerate(given.outputs.items()):
        metric.update({"pred_logits": logits[None], "pred_boxes": boxes[None]}, targets_of(id_))
        if number in (4, IMAGES - 1):  # also if more images come after it was computed
            figures = metric.compute()
            wanted = {name: figures[name] for name in metric.figures}
            assert resampled(metric, np.ones(IMAGES, np.int64)) == pytest.approx(wanted, abs=1e-12)


def test_a_class_that_no_drawn_image_has_does_not_count(tmp_path: Path) -> None:
    given = scene()
    counts = np.full(IMAGES, 2)
    counts[images_with(given, RARE)] = 0
    metric = given.metric(tmp_path)
    wanted = repeated(given.spec(tmp_path), given, counts)
    assert resampled(metric, counts) == pytest.approx(wanted, abs=1e-9)
    assert wanted != pytest.approx(repeated(given.spec(tmp_path), given, np.full(IMAGES, 2)), abs=1e-3)


def test_chosen_classes_only(tmp_path: Path) -> None:
    given = scene()
    metric = given.metric(tmp_path, eval_class_ids=[2, RARE])
    counts = np.arange(IMAGES) % 3
    wanted = repeated(given.spec(tmp_path), given, counts, (2, RARE))
    assert resampled(metric, counts) == pytest.approx(wanted, abs=1e-9)


def test_only_a_crowd_is_nothing_to_find(tmp_path: Path) -> None:
    given = scene()
    for entry in given.annotations:
        if entry["category_id"] == RARE:
            entry["iscrowd"] = 1
    metric = given.metric(tmp_path)
    counts = np.full(IMAGES, 2)
    wanted = repeated(given.spec(tmp_path), given, counts)
    assert resampled(metric, counts) == pytest.approx(wanted, abs=1e-9)
    assert resampled(given.metric(tmp_path, eval_class_ids=[RARE]), counts) == pytest.approx(
        dict.fromkeys(metric.figures, math.nan), nan_ok=True
    )


def test_images_without_annotations_have_no_figure(tmp_path: Path) -> None:
    given = scene()
    counts = np.zeros(IMAGES, np.int64)
    counts[[1, 6]] = 3  # ids 200 and 700
    wanted = repeated(given.spec(tmp_path), given, counts)
    assert all(math.isnan(value) for value in wanted.values())
    assert resampled(given.metric(tmp_path), counts) == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize("images", ["none", "one"])
def test_nothing_found_is_zero(tmp_path: Path, images: str) -> None:
    """No detections at all, or only in an image that is not drawn."""
    given = scene()
    given.outputs = {} if images == "none" else {100: given.outputs[100]}
    counts = np.ones(IMAGES, np.int64)
    counts[0] = 0 if images == "one" else 1
    metric = given.metric(tmp_path)
    assert resampled(metric, counts) == dict.fromkeys(metric.figures, 0)
