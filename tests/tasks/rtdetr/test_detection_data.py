"""COCO data, boxes and average precision, on small real files."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from taoq.errors import TaoqError
from taoq.spec.load import spec_from_dict
from taoq.tasks.images import read_image
from taoq.tasks.rtdetr.data import (
    INPUT,
    Targets,
    calibration_batches,
    class_names,
    evaluation_batches,
    evaluation_source,
    inference_batches,
)
from taoq.tasks.rtdetr.metric import FIGURES, CocoMetric
from taoq.tasks.rtdetr.predict import detections
from taoq.tasks.rtdetr.spec import RtdetrSpec

SIZES = {"a.jpg": (100, 60), "b.png": (64, 64), "c.JPEG": (50, 90)}
COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def write(folder: Path, *, categories: dict[int, str], annotations: list[dict[str, Any]], **extra: Any) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for name, size in SIZES.items():
        Image.new("RGB", size, "red").save(folder / "images" / name)
    images = [
        {"id": 10 * (number + 1), "file_name": name, "width": size[0], "height": size[1]}
        for number, (name, size) in enumerate(SIZES.items())
    ]
    data = {
        "images": images,
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations)],
        "categories": [{"id": id_, "name": name} for id_, name in categories.items()],
        **extra,
    }
    (folder / "val.json").write_text(json.dumps(data), encoding="utf-8")


def spec(folder: Path, *, classes: int = 2, size: tuple[int, int] = (64, 96), **sections: Any) -> RtdetrSpec:
    source = {"image_dir": str(folder / "images"), "json_file": str(folder / "val.json")}
    dataset = {
        "num_classes": classes,
        "batch_size": 2,
        "workers": 0,
        "test_data_sources": source,
        "quant_calibration_data_sources": {"image_dir": str(folder / "images")},
        "infer_data_sources": {"image_dir": [str(folder / "images")]},
        **sections.pop("dataset", {}),
    }
    dataset["augmentation"] = {"eval_spatial_size": list(size), **dataset.get("augmentation", {})}
    model = {"num_queries": 5, "num_select": 5, **sections.pop("model", {})}
    return spec_from_dict({"model": model, "dataset": dataset, **sections}, RtdetrSpec)


@pytest.mark.parametrize(
    ("ids", "classes", "wanted"),
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
def test_outputs_mean_categories(tmp_path: Path, ids: list[int], classes: int, wanted: tuple[int, ...]) -> None:
    write(tmp_path, categories={id_: f"class_{id_}" for id_ in ids}, annotations=[])
    for remap in (False, classes == 80):
        job = spec(tmp_path, classes=classes, dataset={"remap_mscoco_category": remap})
        _, coco = evaluation_source(job)
        assert coco.category_ids == wanted
        assert [name for name in coco.names if name.startswith("class_")] == [f"class_{id_}" for id_ in ids]


def test_annotations_are_completed_and_degenerate_ones_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [[1, 2, 30, 20], [5, 5, 0, 9], [5, 5, 9, -1], [90, 50, 30, 30]]
    write(
        tmp_path,
        categories={1: "a", 2: "b"},
        annotations=[{"image_id": 10, "category_id": 1, "bbox": box} for box in boxes],
    )
    with caplog.at_level(logging.WARNING, "taoq"):
        _, coco = evaluation_source(spec(tmp_path))
    assert [(entry["bbox"], entry["area"], entry["iscrowd"]) for entry in coco.data["annotations"]] == [
        (boxes[0], 600, 0),
        (boxes[3], 900, 0),  # reaches over the edge, which is usual
    ]
    assert caplog.messages == [
        "dataset.test_data_sources.json_file: 2 annotation(s) without width or height are left out"
    ]


def test_images_are_stretched_to_height_and_width_in_0_to_1(tmp_path: Path) -> None:
    write(tmp_path, categories={1: "a", 2: "b"}, annotations=[])
    first, second = evaluation_batches(spec(tmp_path))
    assert (first.inputs[INPUT].shape, second.inputs[INPUT].shape) == ((2, 3, 64, 96), (1, 3, 64, 96))
    assert first.inputs[INPUT].dtype == torch.float32
    assert first.inputs[INPUT][:, 0].min() > 0.98  # red, through JPEG
    assert first.inputs[INPUT][:, 1:].max() < 0.02
    assert first.targets.image_ids == (10, 20)
    assert first.targets.sizes.tolist() == [[100, 60], [64, 64]]


def test_an_image_is_turned_upright_before_its_size_is_taken(tmp_path: Path) -> None:
    write(tmp_path, categories={1: "a", 2: "b"}, annotations=[])
    image = Image.new("RGB", SIZES["a.jpg"])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "images" / "a.jpg", exif=exif)
    batch = next(iter(evaluation_batches(spec(tmp_path))))
    assert batch.targets.sizes[0].tolist() == [60, 100]


def test_the_shape_of_an_image_can_be_kept_and_boxes_find_their_way_back(tmp_path: Path) -> None:
    write(tmp_path, categories={1: "a", 2: "b"}, annotations=[])
    job = spec(tmp_path, size=(64, 96), dataset={"augmentation": {"preserve_aspect_ratio": True}})
    batches = list(evaluation_batches(job))
    tall = batches[1].inputs[INPUT][0]  # 50 x 90 becomes 36 x 64
    assert tall[0, :, :35].min() > 0.9
    assert tall[:, :, 37:].max() == 0
    logits = torch.full((1, 5, 2), -9.0)
    logits[0, 0, 1] = 9.0
    whole = torch.tensor([[36 / 96 / 2, 0.5, 36 / 96, 1.0]]).expand(1, 5, 4)
    (found,) = detections(job, {"pred_logits": logits, "pred_boxes": whole}, batches[1].targets, 0.5)
    assert torch.allclose(found.boxes, torch.tensor([[0.0, 0.0, 50.0, 90.0]]), atol=1e-4)


def test_the_best_pairs_of_query_and_class_are_the_detections(tmp_path: Path) -> None:
    write(tmp_path, categories={1: "a", 2: "b"}, annotations=[])
    logits = torch.tensor([[[2.0, 1.0], [-3.0, 3.0], [-4.0, -5.0], [0.0, -6.0], [-7.0, -8.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.4, 0.4], *[[0.9, 0.9, 0.1, 0.1]] * 3]])
    targets = Targets((10,), torch.tensor([[100.0, 60.0]]))
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    (found,) = detections(spec(tmp_path, model={"num_select": 3}), outputs, targets, 0.0)
    assert torch.allclose(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    assert found.labels.tolist() == [1, 0, 1]  # one query twice: there is no NMS
    wanted = torch.tensor([[0.0, 0.0, 30.0, 18.0], [40.0, 18.0, 60.0, 42.0], [40.0, 18.0, 60.0, 42.0]])
    assert torch.allclose(found.boxes, wanted, atol=1e-4)  # the first reaches out of the image and is cut
    (found,) = detections(spec(tmp_path), outputs, targets, 0.9)
    assert found.labels.tolist() == [1]


def test_calibration_needs_images_only(tmp_path: Path) -> None:
    write(tmp_path, categories={}, annotations=[])
    assert {path.name for path in calibration_batches(spec(tmp_path)).paths} == set(SIZES)
    (tmp_path / "few.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "b.png"}]}), encoding="utf-8")
    source = {"image_dir": str(tmp_path / "images"), "json_file": str(tmp_path / "few.json")}
    job = spec(tmp_path, dataset={"quant_calibration_data_sources": source})
    assert [path.name for path in calibration_batches(job).paths] == ["b.png"]


def test_the_same_seed_draws_the_same_images(tmp_path: Path) -> None:
    write(tmp_path, categories={}, annotations=[])
    for number in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.png")

    def drawn(seed: int) -> list[Path]:
        job = spec(tmp_path, quantize={"calibration": {"num_samples": 6, "seed": seed}})
        return list(calibration_batches(job).paths)

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(drawn(1)) == 6


def test_memory_holds_one_batch_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, categories={}, annotations=[])
    opened: list[Path] = []

    def counting(path: Path, read: Callable[[Path], Image.Image] = read_image) -> Image.Image:
        opened.append(path)
        return read(path)

    monkeypatch.setattr("taoq.tasks.images.read_image", counting)
    next(iter(inference_batches(spec(tmp_path))))
    assert len(opened) == 2


def test_names_for_inference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, categories={5: "cat", 9: "dog"}, annotations=[])
    assert class_names(spec(tmp_path)) == ("cat", "dog")
    (tmp_path / "names.txt").write_text("x\ny\n", encoding="utf-8")
    classmap = {"image_dir": [str(tmp_path / "images")], "classmap": str(tmp_path / "names.txt")}
    assert class_names(spec(tmp_path, dataset={"infer_data_sources": classmap})) == ("x", "y")
    tao = spec(tmp_path, classes=3, dataset={"infer_data_sources": classmap})
    assert class_names(tao) == ("background", "x", "y")
    with caplog.at_level(logging.WARNING, "taoq"):
        assert class_names(spec(tmp_path, dataset={"test_data_sources": {}})) == ("0", "1")
    assert caplog.messages == ["dataset.infer_data_sources.classmap: nothing names the classes, they are numbered"]


def scene(folder: Path, images: int, classes: int) -> tuple[RtdetrSpec, list[tuple[dict[str, torch.Tensor], Targets]]]:
    """Made-up annotations with crowds and empty images, and outputs that find about half of them."""
    draw = random.Random(0)
    truth = []
    outputs = []
    for image in range(1, images + 1):
        here = []
        for _ in range(draw.randrange(5)):
            x, y, w, h = draw.uniform(0, 200), draw.uniform(0, 200), draw.uniform(5, 99), draw.uniform(5, 99)
            category = draw.randrange(classes)
            here.append((category, x, y, w, h))
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": 2 * category + 1, "area": w * h,
                          "bbox": [x, y, w, h], "iscrowd": int(draw.random() < 0.1)})  # fmt: skip
        logits = torch.tensor([[draw.uniform(-6, -1) for _ in range(classes)] for _ in range(5)])
        boxes = torch.tensor([[draw.uniform(0.2, 0.8), draw.uniform(0.2, 0.8), 0.1, 0.1] for _ in range(5)])
        for query, (category, x, y, w, h) in enumerate(here):
            if draw.random() < 0.7:
                logits[query, category] = draw.uniform(-1, 4)
                shift = draw.uniform(-6, 6)
                boxes[query] = torch.tensor([(x + shift + w / 2) / 300, (y + h / 2) / 300, w / 300, h / 300])
        targets = Targets((image,), torch.tensor([[300.0, 300.0]]))
        outputs.append(({"pred_logits": logits[None], "pred_boxes": boxes[None]}, targets))
    data = {
        "images": [{"id": image, "file_name": f"{image}.jpg"} for image in range(1, images + 1)],
        "annotations": truth,
        "categories": [{"id": 2 * number + 1, "name": f"class {number}"} for number in range(classes)],
    }
    (folder / "val.json").write_text(json.dumps(data), encoding="utf-8")
    return spec(folder, classes=classes, size=(320, 320)), outputs


def test_the_twelve_numbers_are_those_of_one_plain_run_of_pycocotools(tmp_path: Path) -> None:
    job, outputs = scene(tmp_path, images=60, classes=7)
    metric = CocoMetric(job)
    results = []
    for output, targets in outputs:
        metric.update(output, targets)
        for found in detections(job, output, targets, 0.0):
            for score, label, (left, top, right, bottom) in zip(
                found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True
            ):
                results.append({"image_id": targets.image_ids[0], "category_id": 2 * label + 1, "score": score,
                                "bbox": [left, top, right - left, bottom - top]})  # fmt: skip
    figures = metric.compute()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "val.json"))
        plain = COCOeval(truth, truth.loadRes(results), "bbox")
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    assert 0.1 < plain.stats[0] < 0.9
    assert figures == pytest.approx(
        {name: value for name, value in zip(FIGURES, plain.stats.tolist(), strict=True) if value > -1}, abs=1e-12
    )
    assert set(FIGURES) - set(figures) == {"AP_large", "AR_large"}  # there are none of this size
    written = metric.write(tmp_path)
    assert written["coco"]["AP_large"] is None
    precision = plain.eval["precision"][:, :, 3, 0, -1]
    assert written["classes"]["class 3"] == pytest.approx(precision[precision > -1].mean(), abs=1e-12)
    with contextlib.redirect_stdout(io.StringIO()):
        again = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
        again.evaluate()
        again.accumulate()
        again.summarize()
    assert np.allclose(again.stats, plain.stats, atol=2e-3)  # the file is rounded
    with Image.open(tmp_path / "precision_recall.png") as picture:
        assert picture.size == (600, 500)


def test_images_of_another_size_than_the_json_says_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, categories={1: "a", 2: "b"}, annotations=[{"image_id": 10, "category_id": 1, "bbox": [1, 1, 9, 9]}])
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "b.png")
    metric = CocoMetric(spec(tmp_path))
    for batch in evaluation_batches(spec(tmp_path)):
        count = len(batch.paths)
        metric.update({"pred_logits": torch.zeros(count, 5, 2), "pred_boxes": torch.rand(count, 5, 4)}, batch.targets)
    with caplog.at_level(logging.WARNING, "taoq"):
        metric.compute()
    assert caplog.messages == [
        f"{tmp_path / 'val.json'}: 1 image(s) are of another size than it says, first b.png:"
        " are its boxes for these files?"
    ]


def test_categories_can_be_chosen(tmp_path: Path) -> None:
    job, outputs = scene(tmp_path, images=20, classes=3)
    chosen = spec(tmp_path, classes=3, size=(320, 320), dataset={"eval_class_ids": [3]})
    both = [CocoMetric(job), CocoMetric(chosen)]
    for metric in both:
        for output, targets in outputs:
            metric.update(output, targets)
        metric.compute()
    everything, one = (metric.write(tmp_path)["classes"] for metric in both)
    assert one == {"class 1": everything["class 1"]}


def test_nothing_found_is_zero_not_an_error(tmp_path: Path) -> None:
    job, outputs = scene(tmp_path, images=5, classes=3)
    metric = CocoMetric(job)
    for output, targets in outputs:
        metric.update({**output, "pred_logits": torch.full_like(output["pred_logits"], -99.0)}, targets)
    assert metric.compute()["val_mAP"] == pytest.approx(0, abs=0.2)
    empty = CocoMetric(job)
    assert empty.compute()["val_mAP"] == 0


def test_a_spec_without_annotations_says_so(tmp_path: Path) -> None:
    write(tmp_path, categories={1: "a"}, annotations=[])
    with pytest.raises(TaoqError) as error:
        evaluation_source(spec(tmp_path, dataset={"test_data_sources": {}}))
    assert str(error.value).startswith("dataset.test_data_sources.json_file: missing: evaluate needs annotated images")


MEMORY = """
import json, sys
import torch
from taoq.pipeline.memory import peak_resident
from test_detection_data import Targets, spec
from taoq.tasks.rtdetr.metric import CocoMetric
from pathlib import Path
folder, images, queries, classes = Path(sys.argv[1]), 1000, 300, 80
truth = [
    {"id": i + 1, "image_id": i % images + 1, "category_id": i % classes, "bbox": [9, 9, 40, 40]} for i in range(7000)
]
(folder / "val.json").write_text(json.dumps({
    "images": [{"id": i + 1, "file_name": "x"} for i in range(images)], "annotations": truth,
    "categories": [{"id": i, "name": str(i)} for i in range(classes)]}))
job = spec(folder, classes=classes, size=(640, 640), model={"num_queries": queries, "num_select": queries})
metric = CocoMetric(job)
generator = torch.Generator().manual_seed(0)
before = peak_resident()
for start in range(0, images, 50):
    outputs = {"pred_logits": torch.randn(50, queries, classes, generator=generator),
               "pred_boxes": torch.rand(50, queries, 4, generator=generator)}
    metric.update(outputs, Targets(tuple(range(start + 1, start + 51)), torch.full((50, 2), 640.0)))
metric.compute()
print((peak_resident() - before) / 1024**2)
"""


def test_evaluation_keeps_little(tmp_path: Path) -> None:
    """300,000 detections; the whole of it beyond start-up."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(run.stdout) < 200  # MB
