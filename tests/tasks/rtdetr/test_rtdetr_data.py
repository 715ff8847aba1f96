"""Boxes in the pixels of turned and padded images, what inference writes, and COCO's limit of detections."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from taoq.errors import SpecError, TaoqError
from taoq.spec.load import spec_from_dict
from taoq.tasks.rtdetr.data import INPUT, Targets, calibration_batches, evaluation_batches, inference_batches, read_coco
from taoq.tasks.rtdetr.metric import FIGURES, CocoMetric
from taoq.tasks.rtdetr.predict import DetectionPredictions, detections
from taoq.tasks.rtdetr.spec import RtdetrSpec

CATEGORIES = ({"id": 3, "name": "traffic light"}, {"id": 7, "name": "car"})
FAR_BELOW = -9.0


def write_coco(
    folder: Path,
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]] = (),
    categories: Sequence[dict[str, Any]] = CATEGORIES,
) -> Path:
    path = folder / "val.json"
    data = {"images": list(images), "annotations": list(annotations), "categories": list(categories)}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def spec(folder: Path, *, classes: int = 2, num_select: int = 4, queries: int = 4, **sections: Any) -> RtdetrSpec:
    dataset = {
        "num_classes": classes,
        "batch_size": 2,
        "workers": 0,
        "test_data_sources": {"image_dir": str(folder / "images"), "json_file": str(folder / "val.json")},
        "quant_calibration_data_sources": {"image_dir": str(folder / "images")},
        **sections.pop("dataset", {}),
    }
    dataset.setdefault("augmentation", {"eval_spatial_size": [64, 96]})
    model = {"num_queries": queries, "num_select": num_select}
    return spec_from_dict({"model": model, "dataset": dataset, **sections}, RtdetrSpec)


def outputs(
    found: Sequence[tuple[int, float, Sequence[float]]], queries: int = 4, classes: int = 2
) -> dict[str, Tensor]:
    """Of one image: class, logit, and box as center and size in 0..1 of each query that finds something."""
    logits = torch.full((1, queries, classes), FAR_BELOW)
    boxes = torch.full((1, queries, 4), 0.5)
    for query, (label, logit, box) in enumerate(found):
        logits[0, query, label] = logit
        boxes[0, query] = torch.tensor(box)
    return {"pred_logits": logits, "pred_boxes": boxes}


def white_box(image: Tensor) -> list[float]:
    """Center and size, in 0..1 of the input, of what is white in it."""
    rows, columns = np.nonzero((image.mean(0) > 0.5).numpy())
    height, width = image.shape[1:]
    left, right = columns.min() / width, (columns.max() + 1) / width
    top, bottom = rows.min() / height, (rows.max() + 1) / height
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def upright(orientation: int, box: Sequence[int], size: tuple[int, int]) -> list[int]:
    """A box of stored pixels in the image as it is seen: the table of the EXIF standard."""
    (left, top, right, bottom), (width, height) = box, size
    return {
        1: [left, top, right, bottom],
        2: [width - right, top, width - left, bottom],
        3: [width - right, height - bottom, width - left, height - top],
        4: [left, height - bottom, right, height - top],
        5: [top, left, bottom, right],
        6: [height - bottom, left, height - top, right],
        7: [height - bottom, width - right, height - top, width - left],
        8: [top, width - right, bottom, width - left],
    }[orientation]


@pytest.mark.parametrize("keep_shape", [False, True], ids=["stretched", "padded"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_seen_in_the_input_lands_on_the_upright_image(tmp_path: Path, orientation: int, keep_shape: bool) -> None:
    (tmp_path / "images").mkdir()
    image, box = Image.new("RGB", (480, 320)), [120, 40, 240, 160]
    image.paste("white", (box[0], box[1], box[2], box[3]))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "images" / "a.png", exif=exif)
    write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}])
    augmentation = {"eval_spatial_size": [320, 416], "preserve_aspect_ratio": keep_shape}
    job = spec(tmp_path, dataset={"augmentation": augmentation})
    (batch,) = evaluation_batches(job)
    assert batch.targets.sizes.tolist() == [[480, 320] if orientation < 5 else [320, 480]]
    result = outputs([(1, 5.0, white_box(batch.inputs[INPUT][0]))])
    (found,) = detections(job, result, batch.targets, 0.5)
    assert found.boxes[0].tolist() == pytest.approx(upright(orientation, box, (480, 320)), abs=1)


@pytest.mark.parametrize("size", [(50, 90), (333, 100), (97, 41), (640, 3), (64, 64)])
def test_the_edges_of_a_padded_image_are_the_edges_of_the_image(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", size, "white").save(tmp_path / "images" / "a.png")
    write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}])
    augmentation = {"eval_spatial_size": [64, 96], "preserve_aspect_ratio": True}
    job = spec(tmp_path, dataset={"augmentation": augmentation})
    (batch,) = evaluation_batches(job)
    x, y, w, h = white_box(batch.inputs[INPUT][0])
    assert (x - w / 2, y - h / 2) == pytest.approx((0, 0))
    center = [x, y, w / 2, h / 2]  # half of it: nothing is clipped
    (found,) = detections(job, outputs([(0, 5.0, center)]), batch.targets, 0.5)
    width, height = size
    assert found.boxes[0].tolist() == pytest.approx([width / 4, height / 4, 3 * width / 4, 3 * height / 4], rel=1e-4)


def test_each_image_of_a_batch_has_its_own_size(tmp_path: Path) -> None:
    one = outputs([(0, 5.0, [0.5, 0.5, 1.0, 1.0])])
    both = {name: value.repeat(2, 1, 1) for name, value in one.items()}
    targets = Targets((1, 2), torch.tensor([[100.0, 60.0], [30.0, 90.0]]))
    found = [entry.boxes[0].tolist() for entry in detections(spec(tmp_path), both, targets, 0.5)]
    assert found == [[0, 0, 100, 60], [0, 0, 30, 90]]


def test_odd_values_of_annotations_are_completed(tmp_path: Path) -> None:
    common = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 20]}
    path = write_coco(
        tmp_path,
        [{"id": 1, "file_name": "a.png", "width": "100", "height": None}],
        [{**common, "area": None, "iscrowd": None}, {**common, "area": 7, "iscrowd": True}, {**common, "id": "x"}],
        [{"id": 3, "name": 3}, {"id": 7, "name": "car"}],
    )
    coco = read_coco(str(path), "json_file", spec(tmp_path))
    assert [(entry["id"], entry["area"], entry["iscrowd"]) for entry in coco.data["annotations"]] == [
        (1, 600, 0), (2, 7, 1), (3, 600, 0),
    ]  # fmt: skip
    assert coco.names == ("3", "car")


@pytest.mark.parametrize(
    ("ids", "classes", "remap", "message"),
    [
        (
            [3, 7], 4, False,
            "dataset.num_classes: is 4; {json} has 2 categories with ids up to 7\n"
            "hint: write 2, or 8 if the network was trained with TAO's largest id + 1",
        ),
        (
            [3, 7], 8, True,
            "dataset.num_classes: is 8; {json} has 2 categories with ids up to 7\n"
            "hint: write 2, or dataset.remap_mscoco_category: false if the outputs are category ids",
        ),
        ([], 1, False, "{json}: names no categories\nhint: name a COCO json with categories"),
    ],
    ids=["neither fits", "remapped and yet the ids", "no categories"],
)  # fmt: skip
def test_classes_that_do_not_fit_the_json_are_refused(
    tmp_path: Path, ids: list[int], classes: int, remap: bool, message: str
) -> None:
    categories = [{"id": id_, "name": str(id_)} for id_ in ids]
    path = write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}], (), categories)
    job = spec(tmp_path, classes=classes, num_select=1, dataset={"remap_mscoco_category": remap})
    with pytest.raises(TaoqError) as error:
        read_coco(str(path), "json_file", job)
    assert str(error.value) == message.format(json=path)


def test_calibration_takes_json_and_folder_in_the_same_seeded_draw(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    names = [f"{number:02}.png" for number in range(12)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"images": [{"id": n, "file_name": name} for n, name in enumerate(names)]}))
    source = {"image_dir": str(tmp_path / "images"), "json_file": str(listed)}
    calibration = {"quantize": {"calibration": {"num_samples": 5, "seed": 3, "batch_size": 4}}}
    draws = [
        [Path(path).name for batch in calibration_batches(job) for path in batch.paths]
        for job in (
            spec(tmp_path, **calibration),
            spec(tmp_path, dataset={"quant_calibration_data_sources": source}, **calibration),
        )
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 5


def infer(folder: Path, folders: Sequence[str], classmap: str = "traffic light\ncar\n", **inference: Any) -> Path:
    """Write predictions for images of some folders, where each has one car, surely, and one light, hardly."""
    (folder / "names.txt").write_text(classmap, encoding="utf-8")
    (folder / "out").mkdir()
    source = {"image_dir": [str(folder / name) for name in folders], "classmap": str(folder / "names.txt")}
    job = spec(folder, dataset={"infer_data_sources": source, "batch_size": 1}, inference=inference)
    result = outputs([(1, 4.0, [0.5, 0.5, 0.5, 0.5]), (0, -1.0, [0.0, 0.0, 0.5, 0.5])])
    with DetectionPredictions(job, folder / "out") as predictions:
        for batch in inference_batches(job):
            predictions.write(result, batch)
    return folder / "out"


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 40)).save(folder / name)


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_inference_writes_whole_kitti_lines_and_a_json_that_coco_reads(tmp_path: Path) -> None:
    pictures(tmp_path, "one/a.png")
    out = infer(tmp_path, ["one"], conf_threshold=0.25)
    zeros = "0.00 0.00 0.00 0.00 0.00 0.00 0.00"
    assert (out / "labels" / "a.txt").read_text(encoding="utf-8").splitlines() == [
        f"car 0.00 0 0.00 20.00 10.00 60.00 30.00 {zeros} 0.9820",
        f"traffic_light 0.00 0 0.00 0.00 0.00 20.00 10.00 {zeros} 0.2689",
    ]
    assert json.loads((out / "detections.json").read_text(encoding="utf-8")) == {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 40}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 10, 40, 20], "area": 800, "iscrowd": 0,
             "score": 0.98201},
            {"id": 2, "image_id": 1, "category_id": 0, "bbox": [0, 0, 20, 10], "area": 200, "iscrowd": 0,
             "score": 0.26894},
        ],
        "categories": [{"id": 0, "name": "traffic light"}, {"id": 1, "name": "car"}],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(str(out / "detections.json")).getAnnIds(imgIds=[1], catIds=[1])) == 1


def test_what_scores_below_the_threshold_is_left_out(tmp_path: Path) -> None:
    pictures(tmp_path, "one/a.png")
    out = infer(tmp_path, ["one"], conf_threshold=0.99)
    assert (out / "labels" / "a.txt").read_text(encoding="utf-8") == ""
    assert json.loads((out / "detections.json").read_text(encoding="utf-8"))["annotations"] == []


def test_files_of_two_folders_with_equal_names_do_not_collide(tmp_path: Path) -> None:
    pictures(tmp_path, "one/a.png", "one/a.jpg", "one/deep/a.png", "two/a.png")
    out = infer(tmp_path, ["one", "two"])
    names = ["0/a.jpg", "0/a.png", "0/deep/a.png", "1/a.png"]
    assert below(out / "labels") == ["0/a.png.txt", "0/a.txt", "0/deep/a.txt", "1/a.txt"]
    assert below(out / "images_annotated") == ["0/a.png", "0/a.png.png", "0/deep/a.png", "1/a.png"]
    images = json.loads((out / "detections.json").read_text(encoding="utf-8"))["images"]
    assert sorted(image["file_name"] for image in images) == names
    assert [image["id"] for image in images] == [1, 2, 3, 4]


@pytest.mark.parametrize(("every", "drawn"), [(0, []), (1, ["0.png", "1.png", "2.png"]), (2, ["0.png", "2.png"])])
def test_pictures_of_every_nth_batch_are_drawn(tmp_path: Path, every: int, drawn: list[str]) -> None:
    pictures(tmp_path, "one/0.png", "one/1.png", "one/2.png")
    out = infer(tmp_path, ["one"], vis_after_n_batches=every)
    assert below(out / "images_annotated") == drawn
    assert below(out / "labels") == ["0.txt", "1.txt", "2.txt"]


@pytest.mark.parametrize(("color", "wanted"), [("red", (255, 0, 0)), ("#00f", (0, 0, 255)), ("#0a0b0c", (10, 11, 12))])
def test_a_box_has_the_color_of_the_map(tmp_path: Path, color: str, wanted: tuple[int, int, int]) -> None:
    pictures(tmp_path, "one/a.png")
    out = infer(tmp_path, ["one"], color_map={"car": color}, outline_width=2)
    with Image.open(out / "images_annotated" / "a.png") as picture:
        assert picture.size == (80, 40)
        assert picture.getpixel((60, 28)) == wanted
        assert picture.getpixel((40, 25)) != wanted


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        ({"cat": "red"}, "inference.color_map.cat: there is no class 'cat'\nhint: did you mean 'car'?"),
        ({"7": "red"}, "inference.color_map.7: there is no class '7'\nhint: classes are traffic light, car"),
        ({"car": "rot"}, "inference.color_map.car: unknown colour 'rot'\nhint: write a name (red) or #rrggbb"),
    ],
    ids=["near class", "no class", "no colour"],
)
def test_a_wrong_color_map_is_refused(tmp_path: Path, colors: dict[str, str], message: str) -> None:
    pictures(tmp_path, "one/a.png")
    with pytest.raises(SpecError) as error:
        infer(tmp_path, ["one"], color_map=colors)
    assert str(error.value) == message


QUERIES = 150
CLASSES = 4


def crowded(folder: Path, ids: Sequence[int], images: int = 12) -> list[tuple[dict[str, Tensor], Targets]]:
    """Random boxes, some crowds, empty images; outputs with far more than 100 detections in an image and class."""
    random = np.random.default_rng(5)
    annotations: list[dict[str, Any]] = []
    batches = []
    for image in range(1, images + 1):
        logits = random.normal(-3, 1, (QUERIES, CLASSES)).astype(np.float32)
        boxes = random.uniform(0.1, 0.9, (QUERIES, 4)).astype(np.float32)
        boxes[:, 2:] *= 0.2
        for number in range(0 if image % 5 == 0 else int(random.integers(1, 9))):
            x, y = random.uniform(0, 300, 2)
            w, h = random.uniform(10, 150, 2)
            label = int(random.integers(CLASSES))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": ids[label], "area": w * h,
                 "bbox": [x, y, w, h], "iscrowd": int(number == 3)}
            )  # fmt: skip
            shift = random.uniform(-0.1, 0.1) * w
            boxes[number] = np.array([x + shift + w / 2, y + h / 2, w, h]) / 500
            logits[number, label] = random.normal(-2, 1.5)
        result = {"pred_logits": torch.from_numpy(logits)[None], "pred_boxes": torch.from_numpy(boxes)[None]}
        batches.append((result, Targets((image,), torch.tensor([[500.0, 500.0]]))))
    names = [{"id": id_, "name": f"name of {id_}"} for id_ in ids]
    write_coco(folder, [{"id": n, "file_name": f"{n}.png"} for n in range(1, images + 1)], annotations, names)
    return batches


def plain(
    folder: Path, job: RtdetrSpec, batches: Sequence[tuple[dict[str, Tensor], Targets]], ids: Sequence[int], chosen: Any
) -> COCOeval:
    """pycocotools over everything at once."""
    results = [
        {"image_id": targets.image_ids[0], "category_id": ids[label], "score": score,
         "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        for result, targets in batches
        for found in detections(job, result, targets, 0.0)
        for score, label, box in zip(
            found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True
        )
        if ids[label] >= 0
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "val.json"))
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        if chosen:
            run.params.catIds = chosen
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


@pytest.mark.parametrize("num_select", [100, QUERIES * CLASSES], ids=["100 detections", "all queries and classes"])
@pytest.mark.parametrize("chosen", [None, [9, 2]], ids=["all classes", "two classes"])
def test_figures_are_pycocotools_also_where_an_image_has_many_detections(
    tmp_path: Path, num_select: int, chosen: list[int] | None
) -> None:
    ids = [2, 5, 9, 40]
    batches = crowded(tmp_path, ids)
    job = spec(tmp_path, classes=CLASSES, queries=QUERIES, num_select=num_select, dataset={"eval_class_ids": chosen})
    metric = CocoMetric(job)
    for result, targets in batches:
        metric.update(result, targets)
    figures = metric.compute()
    run = plain(tmp_path, job, batches, ids, chosen)
    wanted = {name: value for name, value in zip(FIGURES, run.stats.tolist(), strict=True) if value > -1}
    assert 0 < wanted["val_mAP"] < 1
    assert figures == pytest.approx(wanted, abs=1e-12)
    classes = metric.write(tmp_path)["classes"]
    for column, id_ in enumerate(sorted(chosen or ids)):
        precision = run.eval["precision"][:, :, column, 0, -1]
        assert classes.pop(f"name of {id_}") == pytest.approx(precision[precision > -1].mean(), abs=1e-12)
    assert classes == {}
    lines = json.loads((tmp_path / "detections.json").read_text(encoding="utf-8"))
    assert len(lines) == 12 * num_select


def test_outputs_that_are_no_category_do_not_count(tmp_path: Path) -> None:
    ids = [1, 2, 3]
    batches = crowded(tmp_path, [-1, *ids])
    data = json.loads((tmp_path / "val.json").read_text(encoding="utf-8"))
    kept = [entry for entry in data["annotations"] if entry["category_id"] > 0]
    write_coco(tmp_path, data["images"], kept, [entry for entry in data["categories"] if entry["id"] > 0])
    job = spec(tmp_path, classes=CLASSES, queries=QUERIES, num_select=QUERIES)
    metric = CocoMetric(job)
    for result, targets in batches:
        metric.update(result, targets)
    run = plain(tmp_path, job, batches, [-1, *ids], None)
    wanted = {name: value for name, value in zip(FIGURES, run.stats.tolist(), strict=True) if value > -1}
    assert metric.compute() == pytest.approx(wanted, abs=1e-12)
    assert set(metric.write(tmp_path)["classes"]) == {"name of 1", "name of 2", "name of 3"}
    lines = json.loads((tmp_path / "detections.json").read_text(encoding="utf-8"))
    assert {line["category_id"] for line in lines} == set(ids)


def test_a_class_without_annotations_has_no_precision(tmp_path: Path) -> None:
    write_coco(
        tmp_path,
        [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        [{"image_id": 1, "category_id": 7, "bbox": [100, 100, 200, 200]}],
    )
    metric = CocoMetric(spec(tmp_path))
    result = outputs([(1, 4.0, [0.5, 0.5, 0.5, 0.5]), (0, 4.0, [0.5, 0.5, 0.5, 0.5])])
    metric.update(result, Targets((1,), torch.tensor([[400.0, 400.0]])))
    figures = metric.compute()
    written = metric.write(tmp_path)
    assert written["classes"] == {"traffic light": None, "car": pytest.approx(1)}
    assert (figures["val_mAP"], figures["AP_large"]) == (pytest.approx(1), pytest.approx(1))
    assert (written["coco"]["AP_small"], "AP_small" in figures) == (None, False)


def test_keys_change_with_all_that_figures_depend_on_and_nothing_else(tmp_path: Path) -> None:
    def keys(**changed: Any) -> tuple[str, str, str]:
        made = spec(tmp_path, **changed)
        return calibration_batches(made).key, evaluation_batches(made).key, CocoMetric(made).key

    image, box = {"id": 1, "file_name": "a.png"}, {"id": 1, "image_id": 1, "bbox": [1, 2, 30, 20]}
    pictures(tmp_path / "images", "a.png")
    write_coco(tmp_path, [image], [box | {"category_id": 3}])
    first = keys()
    assert keys(dataset={"workers": 2}) == first
    assert keys(dataset={"infer_data_sources": {"classmap": "no.txt"}}, evaluate={"checkpoint": "other"}) == first
    for metric_alone in (
        {"num_select": 2},
        {"evaluate": {"conf_threshold": 0.5}},
        {"dataset": {"eval_class_ids": [3]}},
    ):
        assert keys(**metric_alone)[:2] == first[:2]
        assert keys(**metric_alone)[2] != first[2]
    assert all(
        a != b for a, b in zip(keys(dataset={"augmentation": {"eval_spatial_size": [96, 96]}}), first, strict=True)
    )
    write_coco(tmp_path, [image], [box | {"category_id": 7}])
    assert keys()[:2] == first[:2]
    assert keys()[2] != first[2]
    write_coco(tmp_path, [image], [box | {"category_id": 3}])
    assert keys() == first
    Image.new("RGB", (31, 31)).save(tmp_path / "images" / "a.png")
    assert (keys()[0] != first[0], keys()[1] != first[1], keys()[2] == first[2]) == (True, True, True)
