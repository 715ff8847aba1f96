"""Average precision of a detector, against pycocotools on the same detections."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from support.coco import (
    Outputs,
    coco_results,
    detector_outputs,
    detector_spec,
    write_coco,
    write_three_images,
)
from support.commands import read_json
from taoq.tasks.rtdetr.data import Targets, evaluation_batches
from taoq.tasks.rtdetr.metric import FIGURES, CocoMetric
from taoq.tasks.rtdetr.spec import RtdetrSpec

TESTS = Path(__file__).parents[2]
CLASSES = 4
QUERIES = 150

Batches = list[tuple[Outputs, Targets]]


def sparse_scenes(folder: Path, images: int, classes: int) -> tuple[RtdetrSpec, Batches]:
    """Made-up annotations with crowds and empty images, and outputs that find about half of them.

    The category ids are 1, 3, 5, ...
    """
    draw = random.Random(0)
    annotations: list[dict[str, Any]] = []
    batches = []
    for image in range(1, images + 1):
        boxes_of_image = []
        for _ in range(draw.randrange(5)):
            x, y, w, h = draw.uniform(0, 200), draw.uniform(0, 200), draw.uniform(5, 99), draw.uniform(5, 99)
            category = draw.randrange(classes)
            boxes_of_image.append((category, x, y, w, h))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": 2 * category + 1, "area": w * h,
                 "bbox": [x, y, w, h], "iscrowd": int(draw.random() < 0.1)}
            )  # fmt: skip
        logits = torch.tensor([[draw.uniform(-6, -1) for _ in range(classes)] for _ in range(5)])
        boxes = torch.tensor([[draw.uniform(0.2, 0.8), draw.uniform(0.2, 0.8), 0.1, 0.1] for _ in range(5)])
        for query, (category, x, y, w, h) in enumerate(boxes_of_image):
            if draw.random() < 0.7:
                logits[query, category] = draw.uniform(-1, 4)
                shift = draw.uniform(-6, 6)
                boxes[query] = torch.tensor([(x + shift + w / 2) / 300, (y + h / 2) / 300, w / 300, h / 300])
        targets = Targets((image,), torch.tensor([[300.0, 300.0]]))
        batches.append(({"pred_logits": logits[None], "pred_boxes": boxes[None]}, targets))
    write_coco(
        folder,
        [{"id": image, "file_name": f"{image}.jpg"} for image in range(1, images + 1)],
        annotations,
        [{"id": 2 * number + 1, "name": f"class {number}"} for number in range(classes)],
    )
    return detector_spec(folder, classes=classes, size=(320, 320)), batches


def crowded_scenes(folder: Path, ids: Sequence[int], images: int = 12) -> Batches:
    """Random boxes, crowds, empty images; outputs with far more than 100 detections in an image and class."""
    draw = np.random.default_rng(5)
    annotations: list[dict[str, Any]] = []
    batches = []
    for image in range(1, images + 1):
        logits = draw.normal(-3, 1, (QUERIES, CLASSES)).astype(np.float32)
        boxes = draw.uniform(0.1, 0.9, (QUERIES, 4)).astype(np.float32)
        boxes[:, 2:] *= 0.2
        for number in range(0 if image % 5 == 0 else int(draw.integers(1, 9))):
            x, y = draw.uniform(0, 300, 2)
            w, h = draw.uniform(10, 150, 2)
            label = int(draw.integers(CLASSES))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": ids[label], "area": w * h,
                 "bbox": [x, y, w, h], "iscrowd": int(number == 3)}
            )  # fmt: skip
            shift = draw.uniform(-0.1, 0.1) * w
            boxes[number] = np.array([x + shift + w / 2, y + h / 2, w, h]) / 500
            logits[number, label] = draw.normal(-2, 1.5)
        outputs = {"pred_logits": torch.from_numpy(logits)[None], "pred_boxes": torch.from_numpy(boxes)[None]}
        batches.append((outputs, Targets((image,), torch.tensor([[500.0, 500.0]]))))
    names = [{"id": id_, "name": f"name of {id_}"} for id_ in ids]
    write_coco(folder, [{"id": n, "file_name": f"{n}.png"} for n in range(1, images + 1)], annotations, names)
    return batches


def metric_of(spec: RtdetrSpec, batches: Batches) -> CocoMetric:
    metric = CocoMetric(spec)
    for outputs, targets in batches:
        metric.update(outputs, targets)
    return metric


def run_pycocotools(folder: Path, results: Any, category_ids: Sequence[int] | None = None) -> COCOeval:
    """One plain run of pycocotools over results, or a file of them."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(str(folder / "val.json"))
        evaluation = COCOeval(annotations, annotations.loadRes(results), "bbox")
        if category_ids:
            evaluation.params.catIds = list(category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def results_of(spec: RtdetrSpec, batches: Batches, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    return [row for outputs, targets in batches for row in coco_results(spec, outputs, targets, category_ids)]


def figures_of(evaluation: COCOeval) -> dict[str, float]:
    """The figures of pycocotools that have a value."""
    return {name: value for name, value in zip(FIGURES, evaluation.stats.tolist(), strict=True) if value > -1}


def class_precision(evaluation: COCOeval, column: int) -> float:
    precision = evaluation.eval["precision"][:, :, column, 0, -1]
    return float(precision[precision > -1].mean())


def test_the_twelve_numbers_are_those_of_pycocotools(tmp_path: Path) -> None:
    spec, batches = sparse_scenes(tmp_path, images=60, classes=7)
    metric = metric_of(spec, batches)
    figures = metric.compute()
    expected = run_pycocotools(tmp_path, results_of(spec, batches, range(1, 15, 2)))
    assert 0.1 < expected.stats[0] < 0.9
    assert figures == pytest.approx(figures_of(expected), abs=1e-12)
    assert set(FIGURES) - set(figures) == {"AP_large", "AR_large"}  # there are none of this size
    written = metric.write(tmp_path)
    assert written["coco"]["AP_large"] is None
    assert written["classes"]["class 3"] == pytest.approx(class_precision(expected, 3), abs=1e-12)
    from_file = run_pycocotools(tmp_path, str(tmp_path / "detections.json"))
    assert np.allclose(from_file.stats, expected.stats, atol=2e-3)  # the file is rounded
    with Image.open(tmp_path / "precision_recall.png") as picture:
        assert picture.size == (600, 500)


@pytest.mark.parametrize("num_select", [100, QUERIES * CLASSES], ids=["100 detections", "all queries and classes"])
@pytest.mark.parametrize("chosen", [None, [9, 2]], ids=["all classes", "two classes"])
def test_an_image_may_have_more_detections_than_pycocotools_counts(
    tmp_path: Path, num_select: int, chosen: list[int] | None
) -> None:
    ids = [2, 5, 9, 40]
    batches = crowded_scenes(tmp_path, ids)
    spec = detector_spec(
        tmp_path, classes=CLASSES, queries=QUERIES, num_select=num_select, dataset={"eval_class_ids": chosen}
    )
    metric = metric_of(spec, batches)
    figures = metric.compute()
    evaluation = run_pycocotools(tmp_path, results_of(spec, batches, ids), chosen)
    expected = figures_of(evaluation)
    assert 0 < expected["val_mAP"] < 1
    assert figures == pytest.approx(expected, abs=1e-12)
    written = metric.write(tmp_path)
    over_all = figures_of(run_pycocotools(tmp_path, results_of(spec, batches, ids)))
    both = {name: pytest.approx(over_all[name], abs=1e-12) for name in ("val_mAP", "val_mAP50")}
    assert written.get("all_classes") == (both if chosen else None)
    assert written["classes"] == {
        f"name of {id_}": pytest.approx(class_precision(evaluation, column), abs=1e-12)
        for column, id_ in enumerate(sorted(chosen or ids))
    }
    assert len(read_json(tmp_path / "detections.json")) == 12 * num_select


def test_outputs_that_are_no_category_do_not_count(tmp_path: Path) -> None:
    ids = [1, 2, 3]
    batches = crowded_scenes(tmp_path, [-1, *ids])
    data = read_json(tmp_path / "val.json")
    annotations = [annotation for annotation in data["annotations"] if annotation["category_id"] > 0]
    write_coco(tmp_path, data["images"], annotations, [entry for entry in data["categories"] if entry["id"] > 0])
    spec = detector_spec(tmp_path, classes=CLASSES, queries=QUERIES, dataset={"category_ids": "as_ids"})
    metric = metric_of(spec, batches)
    expected = figures_of(run_pycocotools(tmp_path, results_of(spec, batches, [-1, *ids])))
    assert metric.compute() == pytest.approx(expected, abs=1e-12)
    assert set(metric.write(tmp_path)["classes"]) == {"name of 1", "name of 2", "name of 3"}
    assert {row["category_id"] for row in read_json(tmp_path / "detections.json")} == set(ids)


def test_a_class_without_annotations_has_no_precision(tmp_path: Path) -> None:
    write_coco(
        tmp_path,
        [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        [{"image_id": 1, "category_id": 7, "bbox": [100, 100, 200, 200]}],
    )
    outputs = detector_outputs([(1, 4.0, [0.5, 0.5, 0.5, 0.5]), (0, 4.0, [0.5, 0.5, 0.5, 0.5])])
    metric = metric_of(detector_spec(tmp_path), [(outputs, Targets((1,), torch.tensor([[400.0, 400.0]])))])
    figures = metric.compute()
    written = metric.write(tmp_path)
    assert written["classes"] == {"traffic light": None, "car": pytest.approx(1)}
    assert (figures["val_mAP"], figures["AP_large"]) == (pytest.approx(1), pytest.approx(1))
    assert (written["coco"]["AP_small"], "AP_small" in figures) == (None, False)


def test_categories_can_be_chosen(tmp_path: Path) -> None:
    spec, batches = sparse_scenes(tmp_path, images=20, classes=3)
    of_class_1 = detector_spec(tmp_path, classes=3, size=(320, 320), dataset={"eval_class_ids": [3]})
    metrics = [metric_of(spec, batches), metric_of(of_class_1, batches)]
    for metric in metrics:
        metric.compute()
    all_classes, chosen_classes = (metric.write(tmp_path)["classes"] for metric in metrics)
    assert chosen_classes == {"class 1": all_classes["class 1"]}


def test_no_detection_is_zero_not_an_error(tmp_path: Path) -> None:
    spec, batches = sparse_scenes(tmp_path, images=5, classes=3)
    unsure = [
        ({**outputs, "pred_logits": torch.full_like(outputs["pred_logits"], -99.0)}, targets)
        for outputs, targets in batches
    ]
    assert metric_of(spec, unsure).compute()["val_mAP"] == pytest.approx(0, abs=0.2)
    assert metric_of(spec, []).compute()["val_mAP"] == 0


def test_images_of_another_size_than_in_the_json_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_three_images(tmp_path, annotations=[{"image_id": 10, "category_id": 1, "bbox": [1, 1, 9, 9]}])
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "b.png")
    metric = CocoMetric(detector_spec(tmp_path))
    for batch in evaluation_batches(detector_spec(tmp_path)):
        count = len(batch.paths)
        metric.update({"pred_logits": torch.zeros(count, 5, 2), "pred_boxes": torch.rand(count, 5, 4)}, batch.targets)
    with caplog.at_level(logging.WARNING, "taoq"):
        metric.compute()
    assert caplog.messages == [
        f"{tmp_path / 'val.json'}: 1 image(s) have another size than it says, first b.png:"
        " are its boxes for these files?"
    ]


MEMORY = """
import sys
from pathlib import Path
import torch
from support.coco import detector_spec, write_coco
from taoq.pipeline.memory import peak_resident
from taoq.tasks.rtdetr.data import Targets
from taoq.tasks.rtdetr.metric import CocoMetric
folder, images, queries, classes = Path(sys.argv[1]), 1000, 300, 80
annotations = [
    {"id": i + 1, "image_id": i % images + 1, "category_id": i % classes, "bbox": [9, 9, 40, 40]} for i in range(7000)
]
names = [{"id": i, "name": str(i)} for i in range(classes)]
write_coco(folder, [{"id": i + 1, "file_name": "x"} for i in range(images)], annotations, names)
metric = CocoMetric(detector_spec(folder, classes=classes, queries=queries, size=(640, 640)))
generator = torch.Generator().manual_seed(0)
before = peak_resident()
for start in range(0, images, 50):
    outputs = {"pred_logits": torch.randn(50, queries, classes, generator=generator),
               "pred_boxes": torch.rand(50, queries, 4, generator=generator)}
    metric.update(outputs, Targets(tuple(range(start + 1, start + 51)), torch.full((50, 2), 640.0)))
metric.compute()
print((peak_resident() - before) / 1024**2)
"""


@pytest.mark.soak
def test_evaluation_of_300_000_detections_takes_little_memory(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=TESTS, capture_output=True, text=True, check=True
    )
    assert float(process.stdout) < 200  # MB beyond start-up
